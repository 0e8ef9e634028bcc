#!/usr/bin/env python3
"""Measures how static ranges of activations change a VLM's answers, in PyTorch: int8 at every linear of the language model.

    python tools/trial_static.py MODEL_DIR --questions 24 --samples 24 --synthetic 0 --text README.md
    python tools/trial_static.py MODEL_DIR --weights W4A8 --questions 612 --device cuda --photographs photographs --output static.jsonl

Compares one range for all tokens with one per class (vision, text); with and without treating sinks separately (dynamic, and excluded from
the ranges) and excluding outliers that no rule names; several estimators; with and without full rotation; and dynamic ranges. Weights are
the original's, so that only activations differ, or rounded as `convert --type W4A8` does, with ranges of the rounded model as in a file.
Divergence is from the original with 16-bit activations. Also prints sinks, ratios of ranges by site, and the share beyond a range.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
import trial_quality as trial
from mbq_gguf.calibration import batches as batching
from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.dataset import load_samples
from mbq_gguf.calibration.magnitudes import Magnitudes
from mbq_gguf.calibration.observe import Watch
from mbq_gguf.calibration.sinks import Sinks, find_outliers, name_sinks
from mbq_gguf.calibration.stream import capture, logits, pass_batch, split_back, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.synthetic import synthetic_streams
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.layer import Layer
from mbq_gguf.outcome import QuantiseResult, apply_outcome
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import SAMPLES, QuantiseSettings
from mbq_gguf.transforms.activations import int8_inputs
from mbq_gguf.transforms.rotation import Rotation, draw, rotate_layer
from mbq_gguf.walk import before as walk
from mbq_gguf.walk.before import ROTATION_SEED
from rich.console import Console
from rich.progress import track
from rich.table import Table
from static_variants import OUTLIER, SINK, TEXT, VARIANTS, VISION, Counted, Variant
from trial_rows import asked, device_name, divergences, figures, keep_texts
from trial_w4a8 import added

CARD_TOKENS = 16384  # per batch on a GPU, where a launch costs more than the products of a layer


def classes(stream: Streamed, sinks: Sinks, outlier: torch.Tensor | None = None) -> torch.Tensor:
    kinds = stream.vision.long() if outlier is None else stream.vision.long() + OUTLIER * outlier
    return torch.where(sinks.of(stream), SINK, kinds)


@dataclass(frozen=True)
class Run:
    """The model's layers for a trial, in the basis of ``rotation``."""

    loaded: LoadedModel
    rotation: Rotation | None
    layers: list[Layer]


@torch.no_grad()
def run_of(loaded: LoadedModel, rotation: Rotation | None = None, result: QuantiseResult | None = None) -> Run:
    """The original's layers, rotated, with the weights of ``result`` if given."""
    layers = []
    for index in range(len(loaded.decoder.layers)):
        layer = working_layer(loaded, index)
        if rotation:
            rotate_layer(layer, rotation)
        if result:
            apply_outcome(layer, result.layer(index))
        layers.append(layer)
    return Run(loaded, rotation, layers)


@torch.no_grad()
def count(run: Run, streams: Sequence[Streamed], sinks: Sinks, outliers: Sequence[torch.Tensor] = ()) -> Counted:
    """Count magnitudes of the inputs of every site, by class; ``outliers`` come from the calibration set."""
    of_all = torch.cat([classes(*each) for each in zip(streams, [sinks] * len(streams), outliers or [None] * len(streams), strict=True)])
    running = [replace(stream, hidden=trial.turned(stream.hidden, run.rotation)) for stream in streams]
    counted: Counted = {}
    for layer in run.layers:
        done = 0  # tokens
        for batch in batches(running, layer):
            with Watch(layer) as watch:
                parts = pass_batch(layer, batch)
            kinds = of_all[done : done + parts["hidden"].shape[1]]
            done += len(kinds)
            for site in layer.sites:
                for kind in range(OUTLIER + VISION + 1):
                    counted.setdefault((layer.index, site.name, kind), Magnitudes()).add(watch.inputs[site.name][0][kinds == kind])
            split_back(batch, parts)
    return counted


@torch.no_grad()
def answers(run: Run, streams: Sequence[Streamed], sinks: Sinks, counted: Counted, variant: Variant | None) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of each stream; ``variant`` None: 16-bit activations."""
    running = [replace(stream, hidden=trial.turned(stream.hidden, run.rotation)) for stream in streams]
    for layer in run.layers:
        ranges = {}
        if variant:
            for site in layer.sites:
                ranges[site] = torch.tensor([variant.range(counted, layer.index, site.name, kind) for kind in (TEXT, VISION, SINK)])
        for batch in batches(running, layer):
            kinds = torch.cat([classes(stream, sinks) for stream in batch])
            with ExitStack() as stack:
                for site, of in ranges.items():
                    readers = [layer.holder(name) for name in site.readers]
                    stack.enter_context(int8_inputs(readers, ranges=of[kinds].to(layer.device)))
                parts = pass_batch(layer, batch)
            split_back(batch, parts)
    out = []
    for stream in running:
        hidden = trial.turned(stream.hidden, run.rotation, back=True)
        out.append(logits(run.loaded, hidden[:, :-1][:, stream.labels[1:]])[0].float().log_softmax(-1).cpu())
    return out


def described(counted: Counted, asked: Counted) -> Table:
    """By site, medians over layers: vision range over text range, sinks over text, text's largest value over its 99.99th percentile, and
    the share beyond the calibrated min-max range.
    """
    table = Table("site", "vision / text", "text, lowest to highest", "sinks / text", "largest / 99.99 %", "beyond: text", "vision")
    for site in dict.fromkeys(site for _, site, _ in counted):
        of = {kind: [m for (_, name, k), m in sorted(counted.items()) if (name, k) == (site, kind)] for kind in (TEXT, VISION, SINK)}
        new = {kind: [m for (_, name, k), m in sorted(asked.items()) if (name, k) == (site, kind)] for kind in (TEXT, VISION, SINK)}
        text = [m.largest for m in of[TEXT]]  # without outliers
        ratios = [[m.largest / t for m, t in zip(of[kind], text, strict=True)] for kind in (VISION, SINK)]
        tails = [m.largest / m.quantile(0.9999) for m in of[TEXT] if m.largest]
        cut = [sum(b.beyond(a.largest) for a, b in zip(of[kind], new[kind], strict=True)) / len(text) for kind in (TEXT, VISION)]
        vision = f"{median(ratios[0]):.2f} ({min(ratios[0]):.2f} to {max(ratios[0]):.2f})"
        most = [f"{median(of):.2f} (most {max(of):.3g})" for of in (ratios[1], tails)]
        table.add_row(site, vision, f"{min(text):.3g} to {max(text):.3g}", *most, *(f"{share:.2e}" for share in cut))
    return table


def clipped(variant: Variant | None, counted: Counted, asked: Counted) -> dict[str, float]:
    """The share of values beyond their static range, by class."""
    if variant is None or variant.estimator is None:
        return {}
    found = {}
    for name, kind in (("text", TEXT), ("vision", VISION)):
        of = {place: magnitudes for place, magnitudes in asked.items() if place[2] == kind}
        values = sum(int(magnitudes.counts.sum()) for magnitudes in of.values())
        beyond = sum(m.beyond(variant.range(counted, *place)) * int(m.counts.sum()) for place, m in of.items())
        if values:
            found[name] = beyond / values
    return found


def shown(found: dict[str, float], beyond: dict[str, float]) -> list[str]:
    share = " / ".join(f"{100 * share:.2g}" for share in beyond.values())
    return [f"{found['exact']:.3f}", f"{found['kld']:.2g} ± {found['error']:.1g}", share]


def calibration_streams(loaded: LoadedModel, samples: int, synthetic: int, seed: int) -> list[Streamed]:
    """The shipped set and the texts that the model generates, as in a conversion."""
    loaded_samples = load_samples(None, loaded, samples, seed)
    streams = list(capture(loaded, loaded_samples))
    if synthetic:
        texts = walk.written(loaded, synthetic, lambda _done, _total: None)  # type: ignore[attr-defined]
        streams += synthetic_streams(loaded, texts, loaded_samples, len(texts) // 2)
    return streams


def scored(
    run: Run,
    sets: Mapping[str, Sequence[Streamed]],
    reference: Mapping[str, list[torch.Tensor]],
    sinks: Sinks,
    counted: Counted,
    found: Mapping[str, Counted],
    variants: Iterable[Variant | None],
) -> Iterator[tuple[str, dict[str, object], list[str]]]:
    """The name of each variant, its figures by set, and the cells of a table; ``found`` has the magnitudes of each set."""
    dynamic: dict[str, list[torch.Tensor]] = {}  # the divergences that the others are compared with, token by token
    for variant in variants:
        row: dict[str, object] = {}
        cells = []
        for name, streams in sets.items():
            given = answers(run, streams, sinks, counted, variant)
            scores = figures(reference[name], given, streams)
            if variant == Variant():
                dynamic[name] = divergences(reference[name], given)
            elif variant:
                scores |= added(dynamic[name], divergences(reference[name], given))
            beyond = clipped(variant, counted, found[name])
            row[name] = scores | {"beyond": beyond}
            cells += shown(scores, beyond)
        yield str(variant or "16-bit"), row, cells


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--questions", default=24, show_default=True, help="Number of questions about scenes.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Samples of the shipped calibration set.")
@click.option("--synthetic", default=QuantiseSettings.synthetic, show_default=True, help="Generated texts in addition.")
@click.option("--seed", default=0, show_default=True, help="Seed for choosing samples.")
@click.option("--weights", type=click.Choice(["W4A8", "W8A8"]), help="Type of the rounded weights (default: the original weights).")
@click.option("--text", "file", type=click.Path(exists=True, path_type=Path), help="Text file to score too.")
@click.option("--photographs", "folder", type=click.Path(exists=True, path_type=Path), help="Folder written by photographs.py.")
@click.option("--rotate", "rotations", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS), show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Append each row to this file as a line of JSON.")
@click.option("--device", default="cpu", show_default=True)
def main(
    model_dir: Path,
    questions: int,
    samples: int,
    synthetic: int,
    seed: int,
    weights: str | None,
    file: Path | None,
    folder: Path | None,
    rotations: tuple[str, ...],
    output: Path | None,
    device: str,
) -> None:
    """Score static ranges on MODEL_DIR."""
    console = Console(width=180)
    loaded = load(model_dir, device)
    if device.startswith("cuda"):
        batching.TOKENS = CARD_TOKENS
    keep_texts()
    calibration = calibration_streams(loaded, samples, synthetic, seed)
    sets = {"scenes": asked(loaded, questions)}
    if folder:
        sets["photographs"] = trial.photographs(loaded, folder)
    if file:
        sets["text"] = trial.text(loaded, file)
    for streams in (calibration, *sets.values()):
        streams.sort(key=lambda stream: len(stream.ids))  # attention takes neighbours of one length at once
    outliers = find_outliers(loaded, calibration)
    sinks = name_sinks(calibration, outliers)
    unnamed = [outlier & ~sinks.of(stream) for stream, outlier in zip(calibration, outliers, strict=True)]
    console.print(sinks, f"beside them {sum(int(outlier.sum()) for outlier in unnamed)} outliers that nothing names")
    original = run_of(loaded)
    reference = {name: answers(original, streams, sinks, {}, None) for name, streams in sets.items()}
    for rotate, variants in ((rotate, VARIANTS[rotate]) for rotate in rotations):
        rotation = draw(loaded.decoder, "full", ROTATION_SEED) if rotate == "full" else None
        result = None
        if weights:
            settings = QuantiseSettings(type_name=weights, rotate=rotate, synthetic=synthetic)  # type: ignore[arg-type]
            result = quantise(loaded, load_samples(None, loaded, samples, seed), settings)
        run = run_of(loaded, rotation, result)
        counted = count(run, calibration, sinks, outliers)
        found = {name: count(run, streams, sinks) for name, streams in sets.items()}
        for name in sets:
            console.print(f"rotation {rotate}, {name}", described(counted, found[name]))
        table = Table("activations", *(f"{name}: {what}" for name in sets for what in ("exact", "KLD", "% cut, text / vision")))
        told: dict[str, object] = {"weights": weights or "16-bit", "rotate": rotate, "device": device_name(device)}
        told |= {"samples": samples, "synthetic": synthetic, "seed": seed}
        turns = track((None, *variants), description=f"rotation {rotate}", console=Console(stderr=True))
        for name, row, cells in scored(run, sets, reference, sinks, counted, found, turns):
            table.add_row(name, *cells)
            if output:
                with output.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(told | {"activations": name} | row) + "\n")
        console.print(f"weights {weights or '16-bit'}, rotation {rotate}", table)


if __name__ == "__main__":
    main()
