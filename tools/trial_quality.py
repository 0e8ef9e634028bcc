"""Measures how settings change a VLM's answers, in PyTorch, before any file is written: the ablation of docs/results.md.

    python tools/photographs.py photographs
    python tools/trial_quality.py MODEL_DIR "" seed=1 samples=32,synthetic=0 type_name=Q4_0 rotate=full --photographs photographs

Each argument is one variant: ``samples``, ``seed``, ``turns`` and fields of QuantiseSettings; "" is the default. Quantises the language
model's linears, puts the rounded values into the Hugging Face model, and compares it with the original, forced along the expected answers
of the demo's eval set, along the original's own answers about photographs, and along a text. KL divergence is in nats.
"""

from __future__ import annotations

import ast
import json
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from mbq_gguf.calibration.dataset import Sample, Turns, load_samples, read_jsonl
from mbq_gguf.calibration.generate import greedy_answer, whole_decoder
from mbq_gguf.calibration.stream import advance, capture, capture_encoded, logits, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.evaluate.exact_match import MAX_TOKENS, SHIPPED
from mbq_gguf.formats.row_scale import QUANT_TYPES
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.layer import Layer
from mbq_gguf.outcome import QuantiseResult, apply_outcome
from mbq_gguf.picture import open_picture
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import SAMPLES, QuantiseSettings
from mbq_gguf.transforms.activations import int8_inputs
from mbq_gguf.transforms.rotation import Rotate, Rotation, draw, rotate_layer
from mbq_gguf.walk.before import ROTATION_SEED
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

TEXT_CHUNK = 256  # tokens; the second half of each is scored
TEXT_CHUNKS = 8

Streams = list[Streamed]


@dataclass(frozen=True)
class Variant:
    """Calibration set and settings."""

    name: str
    samples: int
    seed: int
    turns: Turns
    calib: str  # a set that trial_rows.py knows by name
    settings: QuantiseSettings


def parsed(name: str) -> Variant:
    """Parse ``key=value,key=value``; values are Python literals if possible, else text."""
    found: dict[str, Any] = dict(item.split("=", 1) for item in name.split(",") if item)
    for key, value in found.items():
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            continue
    return Variant(
        name or "default",
        samples=found.pop("samples", SAMPLES),
        seed=found.pop("seed", 0),
        turns=found.pop("turns", "all"),
        calib=found.pop("calib", ""),
        settings=QuantiseSettings(**found),
    )


@torch.no_grad()
def answer_logits(
    loaded: LoadedModel, streams: Sequence[Streamed], result: QuantiseResult | None, rotate: Rotate, int8: bool = False
) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of each stream, with the weights of ``result``, in the basis of ``rotate``.

    With ``int8``, its W4A8 and W8A8 linears use int8 activations, as their product does.
    """
    rotation = draw(loaded.decoder, rotate, ROTATION_SEED) if result and rotate != "none" else None
    running = [replace(stream, hidden=turned(stream.hidden, rotation)) for stream in streams]
    for index in range(len(loaded.decoder.layers)):
        layer = working_layer(loaded, index)
        if rotation:
            rotate_layer(layer, rotation)
        if result is not None:
            apply_outcome(layer, result.layer(index))
        with int8_inputs(row_scaled(layer, index, result)) if int8 and result else nullcontext():
            advance(layer, running)
    out = []
    for stream in running:
        hidden = turned(stream.hidden, rotation, back=True)
        out.append(logits(loaded, hidden[:, :-1][:, stream.labels[1:]])[0].float().log_softmax(-1).cpu())
    return out


def turned(hidden: torch.Tensor, rotation: Rotation | None, back: bool = False) -> torch.Tensor:
    """``hidden`` in the rotated basis, or back."""
    if rotation is None:
        return hidden
    return (hidden.double() @ (rotation.residual.t() if back else rotation.residual)).to(hidden)


def row_scaled(layer: Layer, index: int, result: QuantiseResult) -> list[nn.Linear]:
    """The linears of ``layer`` that have one scale per row in ``result``."""
    found = [name for name, quantised in result.layer(index).quantised.items() if quantised.type_name in QUANT_TYPES]
    return [layer.holder(name.removesuffix(".weight")) for name in found]


def score(reference: list[torch.Tensor], candidate: list[torch.Tensor], streams: Sequence[Streamed]) -> tuple[str, str]:
    """Mean KLD with its standard error over answer tokens, and the share of questions for which every answer token is the most likely
    one."""
    kld = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, candidate, strict=True)])
    exact = [bool((q.argmax(-1) == s.ids[s.labels]).all()) for q, s in zip(candidate, streams, strict=True)]
    return f"{float(kld.mean()):.4f} ± {float(kld.std()) / len(kld) ** 0.5:.4f}", f"{sum(exact) / len(exact):.3f}"


def bits(result: QuantiseResult) -> float:
    """Bits per weight of the quantised matrices."""
    quantised = result.quantised.values()
    return float(8 * sum(item.data.size for item in quantised) / sum(item.data.shape[0] * item.columns for item in quantised))


def scenes(loaded: LoadedModel, count: int) -> Streams:
    """``count`` questions of the demo's eval set, as inputs of the first layer."""
    samples = read_jsonl(SHIPPED)
    return list(capture(loaded, [Sample(s.image, s.turns[:1]) for s in random.Random(0).sample(samples, min(count, len(samples)))]))


def photographs(loaded: LoadedModel, folder: Path) -> Streams:
    """The questions of photographs.py, each with the model's own answer."""
    samples = []
    with whole_decoder(loaded):
        for entry in map(json.loads, (folder / "photographs.jsonl").read_text(encoding="utf-8").splitlines()):
            path = folder / entry["image"]
            for question in (turn["question"] for turn in entry["turns"]):
                samples.append(Sample(path, ((question, greedy_answer(loaded, open_picture(path), question, MAX_TOKENS) or "."),)))
    return list(capture(loaded, samples))


def text(loaded: LoadedModel, file: Path) -> Streams:
    """Chunks of ``file``; their second halves are scored."""
    ids = loaded.prompts.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    streams = []
    for start in range(0, min(len(ids), TEXT_CHUNK * TEXT_CHUNKS) - TEXT_CHUNK + 1, TEXT_CHUNK):
        stream = capture_encoded(loaded, loaded.encode_text(torch.tensor(ids[start : start + TEXT_CHUNK])))
        streams.append(replace(stream, labels=torch.arange(TEXT_CHUNK) >= TEXT_CHUNK // 2))
    return streams


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.argument("variants", nargs=-1, required=True)
@click.option("--questions", default=120, show_default=True, help="Number of questions about scenes, of the demo's 612.")
@click.option("--photographs", "folder", type=click.Path(exists=True, path_type=Path), help="Folder written by photographs.py.")
@click.option("--text", "file", type=click.Path(exists=True, path_type=Path), help="Text file to score.")
@click.option("--calib", type=click.Path(exists=True, path_type=Path), help="Calibration set, as for convert.")
@click.option("--device", default="cpu", show_default=True)
def main(
    model_dir: Path, variants: tuple[str, ...], questions: int, folder: Path | None, file: Path | None, calib: Path | None, device: str
) -> None:
    """Quantise MODEL_DIR in PyTorch with each of VARIANTS and score the answers."""
    loaded = load(model_dir, device)
    sets = {"scenes": scenes(loaded, questions)}
    if folder:
        sets["photographs"] = photographs(loaded, folder)
    if file:
        sets["text"] = text(loaded, file)
    reference = {name: answer_logits(loaded, streams, None, "none") for name, streams in sets.items()}
    table = Table("variant", "bits per weight", "exact match", *(f"KLD, {name}" for name in sets), "seconds")
    table.add_row("original", "16", score(reference["scenes"], reference["scenes"], sets["scenes"])[1], *("0" for _ in sets), "")
    for variant in track([parsed(name) for name in variants], description="variants"):
        start = time.perf_counter()
        result = quantise(loaded, load_samples(calib, loaded, variant.samples, variant.seed, variant.turns), variant.settings)
        seconds = time.perf_counter() - start
        scored = {n: score(reference[n], answer_logits(loaded, s, result, variant.settings.rotate), s) for n, s in sets.items()}
        table.add_row(variant.name, f"{bits(result):.3f}", scored["scenes"][1], *(kld for kld, _ in scored.values()), f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
