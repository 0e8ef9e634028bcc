"""How well a method and a rounding keep a VLM's answers, in PyTorch, before any file is written.

    python tools/trial_quality.py MODEL_DIR --type MBQ3_64 --trial mbq:gptq --trial awq:gptq --questions 120

Quantises the language model's linears, puts the values that the container gives back into the Hugging Face model, and compares it with the
original on the demo's eval set, teacher-forced on the expected answers: mean KL divergence of the answer tokens (nats), agreement of the
most likely token, and the share of questions whose every answer token is the most likely one in the original.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
from mbq_gguf.allocation.plan import plan_table
from mbq_gguf.calibration.dataset import Sample, load_samples, read_jsonl
from mbq_gguf.calibration.stream import Streamed, advance, capture, logits, working_layer
from mbq_gguf.formats.registry import container
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.decoder import linear
from mbq_gguf.quantise import QuantiseResult, quantise
from mbq_gguf.settings import QuantiseSettings
from rich.console import Console
from rich.progress import track
from rich.table import Table

EVAL = Path(__file__).parents[1] / "converter" / "mbq_gguf" / "demo" / "data" / "eval" / "eval.jsonl"


@torch.no_grad()
def answer_logits(loaded: LoadedModel, streams: Sequence[Streamed], result: QuantiseResult | None) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of each stream, with the weights of ``result`` in place."""
    running = [replace(stream) for stream in streams]
    for index in range(len(loaded.decoder.layers)):
        layer = working_layer(loaded, index)
        if result is not None:
            put(layer, index, result)
        advance(layer, index, running, loaded.device)
    out = []
    for stream in running:
        answered = stream.answer[1:]
        out.append(logits(loaded, stream.hidden[:, :-1][:, answered])[0].float().log_softmax(-1).cpu())
    return out


def put(layer: torch.nn.Module, index: int, result: QuantiseResult) -> None:
    """Overwrite the parameters of ``layer`` with those of ``result``, packed ones as their container gives them back."""
    prefix = f"layers.{index}."
    for name, packed in result.packed.items():
        if name.startswith(prefix):
            weight = linear(layer, name.removeprefix(prefix).removesuffix(".weight")).weight
            weight.copy_(torch.from_numpy(container(packed.container).dequantize(packed.data)))
    parameters = dict(layer.named_parameters())
    for name, value in result.replaced.items():
        if name.startswith(prefix):
            parameters[name.removeprefix(prefix)].copy_(value)


def score(reference: list[torch.Tensor], candidate: list[torch.Tensor], streams: Sequence[Streamed]) -> tuple[float, float, float]:
    """Mean KLD, top-1 agreement over answer tokens, and the share of questions answered exactly."""
    kld = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, candidate, strict=True)])
    top = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(reference, candidate, strict=True)])
    exact = [bool((q.argmax(-1) == s.ids[s.answer]).all()) for q, s in zip(candidate, streams, strict=True)]
    return float(kld.mean()), float(top.float().mean()), sum(exact) / len(exact)


def bits(result: QuantiseResult) -> float:
    """Bits per weight of the quantised matrices."""
    packed = result.packed.values()
    return 8 * sum(item.data.size for item in packed) / sum(item.data.shape[0] * item.columns for item in packed)


def questions(loaded: LoadedModel, count: int, seed: int) -> list[Streamed]:
    """``count`` questions of the demo's eval set at the door of the first layer."""
    samples = random.Random(seed).sample(read_jsonl(EVAL), count)
    return list(capture(loaded, [Sample(s.image, s.turns[:1]) for s in samples]))


@click.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--type", "kind", default="MBQ3", show_default=True)
@click.option("--trial", "trials", multiple=True, default=("mbq:gptq",), help="method:rounding, as often as wanted.")
@click.option("--samples", default=64, show_default=True)
@click.option("--questions", "count", default=120, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--calib", type=click.Path(path_type=Path), default=None)
@click.option("--set", "changes", multiple=True, help="setting=value, for any other field of QuantiseSettings, as Python.")
def main(
    model_dir: Path,
    kind: str,
    trials: tuple[str, ...],
    samples: int,
    count: int,
    seed: int,
    device: str,
    calib: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Quantise in PyTorch and score the answers."""
    loaded = load(model_dir, device)
    asked = questions(loaded, count, seed)
    reference = answer_logits(loaded, asked, None)
    drawn = load_samples(calib, loaded, samples, seed)
    table = Table("method", "rounding", "bits per weight", "KLD", "top-1", "exact match", "seconds")
    table.add_row("original", "", "16", "0", "1", f"{score(reference, reference, asked)[2]:.3f}", "")
    for trial in track(trials, description="trials"):
        method, rounding = trial.split(":")
        settings = QuantiseSettings(container=kind, method=method, rounding=rounding)  # type: ignore[arg-type]
        settings = replace(settings, **{k: eval(v) for k, v in (c.split("=") for c in changes)})
        start = time.perf_counter()
        result = quantise(loaded, drawn, settings)
        seconds = time.perf_counter() - start
        kld, top, exact = score(reference, answer_logits(loaded, asked, result), asked)
        table.add_row(method, rounding, f"{bits(result):.3f}", f"{kld:.4f}", f"{top:.3f}", f"{exact:.3f}", f"{seconds:.0f}")
        if result.plan:
            Console().print(plan_table(result.plan, result.losses))
    Console().print(table)


if __name__ == "__main__":
    main()
