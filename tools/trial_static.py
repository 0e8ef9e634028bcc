#!/usr/bin/env python3
"""What static ranges of activations do to a VLM's answers, in PyTorch: int8 at every linear of the language model, weights as they are.

    python tools/trial_static.py MODEL_DIR --questions 24 --samples 24 --text README.md

One range for all tokens or one a class (vision, text), with or without the sinks apart (dynamic, and out of the ranges), each by several
estimators, with full rotation and without; dynamic beside them. Divergence from the same weights with 16-bit activations, so nothing but
the activations differs. Also prints the sinks, the ratio of the classes' ranges by site, and the share of values beyond their range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
import trial_quality as trial
from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.dataset import load_samples
from mbq_gguf.calibration.magnitudes import Estimator, Magnitudes
from mbq_gguf.calibration.observe import Watch
from mbq_gguf.calibration.sinks import Sinks, find_sinks
from mbq_gguf.calibration.stream import capture, logits, run_batch, split_back, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.layer import Layer
from mbq_gguf.transforms.activations import int8_inputs
from mbq_gguf.transforms.rotation import Rotation, draw, rotate_layer
from mbq_gguf.walk.before import ROTATION_SEED
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trial_rows import asked, figures

TEXT, VISION, SINK = 0, 1, 2
Counted = dict[tuple[int, str, int], Magnitudes]  # by layer, site and class


@dataclass(frozen=True)
class Variant:
    """``estimator`` None: dynamic."""

    estimator: Estimator | None = None
    two: bool = False
    apart: bool = False

    def __str__(self) -> str:
        if self.estimator is None:
            return "dynamic"
        return f"{'two ranges' if self.two else 'one range'}{', sinks apart' if self.apart else ''}, {self.estimator}"

    def range(self, counted: Counted, layer: int, site: str, kind: int) -> float:
        """Of a token of class ``kind``; 0 is dynamic."""
        if self.estimator is None or (self.apart and kind == SINK):
            return 0.0
        kinds = [VISION if kind == VISION else TEXT] if self.two else [TEXT, VISION]
        if not self.apart and TEXT in kinds:
            kinds.append(SINK)
        joined = Magnitudes()
        for each in (counted[layer, site, each] for each in kinds):
            joined.counts, joined.largest = joined.counts + each.counts, max(joined.largest, each.largest)
        return joined.range(self.estimator)


FORMS = ((False, False), (True, False), (False, True), (True, True))
VARIANTS = {
    "full": (
        Variant(),
        *(Variant("minmax", *form) for form in FORMS),
        *(Variant(kind, *form) for kind in ("p99.9", "p99.99", "least-squares") for form in FORMS[2:]),
    ),
    "none": (Variant(), *(Variant("minmax", *form) for form in FORMS), Variant("least-squares", True, True)),
}


def classes(stream: Streamed, sinks: Sinks) -> torch.Tensor:
    return torch.where(sinks.of(stream), SINK, stream.vision.long())


def layers(loaded: LoadedModel, rotation: Rotation | None) -> Iterator[Layer]:
    for index in range(len(loaded.decoder.layers)):
        layer = working_layer(loaded, index)
        if rotation:
            rotate_layer(layer, rotation)
        yield layer


@torch.no_grad()
def count(loaded: LoadedModel, streams: Sequence[Streamed], sinks: Sinks, rotation: Rotation | None) -> Counted:
    """How large the inputs of every site are, by class."""
    running = [replace(stream, hidden=trial.turned(stream.hidden, rotation)) for stream in streams]
    counted: Counted = {}
    for layer in layers(loaded, rotation):
        for batch in batches(running, layer.index):
            with Watch(layer) as watch:
                hidden = run_batch(layer, batch)
            kinds = torch.cat([classes(stream, sinks) for stream in batch])
            for site in layer.sites:
                for kind in (TEXT, VISION, SINK):
                    counted.setdefault((layer.index, site.name, kind), Magnitudes()).add(watch.inputs[site.name][0][kinds == kind])
            split_back(batch, hidden)
    return counted


@torch.no_grad()
def answers(
    loaded: LoadedModel, streams: Sequence[Streamed], sinks: Sinks, rotation: Rotation | None, counted: Counted, variant: Variant | None
) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of each stream; ``variant`` None: 16-bit activations."""
    running = [replace(stream, hidden=trial.turned(stream.hidden, rotation)) for stream in streams]
    for layer in layers(loaded, rotation):
        for batch in batches(running, layer.index):
            kinds = torch.cat([classes(stream, sinks) for stream in batch])
            with ExitStack() as stack:
                for site in layer.sites if variant else ():
                    ranges = torch.tensor([variant.range(counted, layer.index, site.name, kind) for kind in (TEXT, VISION, SINK)])
                    stack.enter_context(int8_inputs([layer.holder(name) for name in site.readers], ranges=ranges[kinds]))
                hidden = run_batch(layer, batch)
            split_back(batch, hidden)
    out = []
    for stream in running:
        hidden = trial.turned(stream.hidden, rotation, back=True)
        out.append(logits(loaded, hidden[:, :-1][:, stream.labels[1:]])[0].float().log_softmax(-1))
    return out


def described(counted: Counted, asked: Counted) -> Table:
    """By site, medians over layers: vision over text range, sinks over text, and what lies beyond the calibrated min-max range."""
    table = Table("site", "vision / text", "text, lowest to highest", "sinks / text", "beyond: text", "vision")
    for site in dict.fromkeys(site for _, site, _ in counted):
        of = {kind: [m for (_, name, k), m in sorted(counted.items()) if (name, k) == (site, kind)] for kind in (TEXT, VISION, SINK)}
        new = {kind: [m for (_, name, k), m in sorted(asked.items()) if (name, k) == (site, kind)] for kind in (TEXT, VISION, SINK)}
        text = [m.largest for m in of[TEXT]]
        ratios = [[m.largest / t for m, t in zip(of[kind], text, strict=True)] for kind in (VISION, SINK)]
        cut = [sum(b.beyond(a.largest) for a, b in zip(of[kind], new[kind], strict=True)) / len(text) for kind in (TEXT, VISION)]
        spread = f"{min(ratios[0]):.2f} to {max(ratios[0]):.2f}"
        table.add_row(
            site,
            f"{median(ratios[0]):.2f} ({spread})",
            f"{min(text):.3g} to {max(text):.3g}",
            f"{median(ratios[1]):.2f} (most {max(ratios[1]):.3g})",
            *(f"{share:.2e}" for share in cut),
        )
    return table


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--questions", default=24, show_default=True, help="About scenes.")
@click.option("--samples", default=24, show_default=True, help="Of the shipped calibration set.")
@click.option("--text", "file", type=click.Path(exists=True, path_type=Path), help="A plain text, scored too.")
@click.option("--photographs", "folder", type=click.Path(exists=True, path_type=Path), help="What photographs.py wrote.")
@click.option("--rotate", "rotations", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS), show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    model_dir: Path, questions: int, samples: int, file: Path | None, folder: Path | None, rotations: tuple[str, ...], device: str
) -> None:
    """Score static ranges on MODEL_DIR."""
    console = Console(width=150)
    loaded = load(model_dir, device)
    calibration = list(capture(loaded, load_samples(None, loaded, samples, 0)))
    sets = {"scenes": asked(loaded, questions)}
    if folder:
        sets["photographs"] = trial.photographs(loaded, folder)
    if file:
        sets["text"] = trial.text(loaded, file)
    sinks = find_sinks(loaded, calibration)
    console.print(sinks)
    for rotate, variants in ((rotate, VARIANTS[rotate]) for rotate in rotations):
        rotation = draw(loaded.decoder, "full", ROTATION_SEED) if rotate == "full" else None
        counted = count(loaded, calibration, sinks, rotation)
        for name, streams in sets.items():
            console.print(f"rotation {rotate}, {name}", described(counted, count(loaded, streams, sinks, rotation)))
        reference = {name: answers(loaded, streams, sinks, rotation, counted, None) for name, streams in sets.items()}
        table = Table("activations", "exact match", *(f"KLD, {name}" for name in sets))
        for variant in track(variants, description=f"rotation {rotate}"):
            scores = [
                figures(reference[name], answers(loaded, streams, sinks, rotation, counted, variant), streams)
                for name, streams in sets.items()
            ]
            table.add_row(str(variant), f"{scores[0]['exact']:.3f}", *(f"{found['kld']:.2g} ± {found['error']:.1g}" for found in scores))
        console.print(table)


if __name__ == "__main__":
    main()
