#!/usr/bin/env python3
"""Runs many trials of trial_quality.py in parallel on a GPU: MBQ and AWQ beside plain rounding, token weights with the default.

    python tools/trial_rows.py MODEL_DIR rows.jsonl --device cuda --jobs 12 --seconds 420 --photographs photographs --text README.md

Each row is written as soon as it is done, in the order of its list. Rows that OUT already has are skipped, and unfinished ones are dropped
when the time is up. Exact match is forced: every answer token is the most likely one after the expected ones before it. Small kernels of
several processes share the GPU only with CUDA's MPS: run nvidia-cuda-mps-control -d first.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
import traceback
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import click
import torch
import trial_quality as trial
import trial_w4a8
from mbq_gguf.calibration.dataset import SHIPPED as CALIBRATION
from mbq_gguf.calibration.dataset import Sample, load_samples, read_jsonl
from mbq_gguf.calibration.stream import capture
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions, stratified
from mbq_gguf.formats.row_scale import QUANT_TYPES
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise import quantise
from mbq_gguf.transforms.rotation import Rotate
from mbq_gguf.walk import before as walk
from trial_w4a8 import added

STORE = Path(__file__).resolve().parents[1] / "docs" / "results" / "balance.json"
NEAREST = "type_name=MBQ3,rounding=nearest,synthetic=0,propagate_error=False,samples=128,turns=last"
PLAIN = "type_name=MBQ3,synthetic=0,propagate_error=False,samples=128,turns=last,clip=False,refits=0"
MASKS = tuple(f",answer_mask={mask}" for mask in ("predicting", "answer"))
WEIGHTS = tuple(f"token_weights={kind}" for kind in ("modality", "gradient", "token"))


def seeds(*variants: str, calib: str = "") -> list[str]:
    """Each variant with two seeds, on the scenes' questions or with captions as answers."""
    return [",".join(part for part in (variant, calib, f"seed={seed}") if part) for variant in variants for seed in (0, 1)]


def methods(base: str, *more: str) -> list[str]:
    return [f"{base},method={method}" for method in ("awq", "mbq", *more)]


ROWS = [
    f"{NEAREST},method=rtn",
    *seeds(*methods(NEAREST), *(f"{NEAREST},method=mbq{mask}" for mask in MASKS)),
    *seeds("", *WEIGHTS, "method=mbq", "method=awq"),
    *seeds(PLAIN, *methods(PLAIN)),
    *seeds(*methods(NEAREST), f"{NEAREST},method=mbq,answer_mask=answer", calib="calib=captions"),
    *seeds("", *WEIGHTS, "method=mbq", calib="calib=captions"),
    *seeds(PLAIN, *methods(PLAIN), calib="calib=captions"),
    *seeds(*(f"{NEAREST},method=mbq,{change}" for change in ("search_loss=mse", "grouped_o=False", "propagate_error=True"))),
    *seeds("turns=last", *(f"{weights},answer_mask=answer" for weights in WEIGHTS[:2])),
    *seeds(f"{PLAIN},method=mbq,answer_mask=answer", f"{NEAREST},method=awq,grouped_o=False"),
    *seeds(*methods(NEAREST.replace("turns=last", "turns=all"))),
]


LISTS = {"balance": ROWS, "w4a8": trial_w4a8.ROWS}


def captions(folder: Path) -> Path:
    """Only the descriptions of the shipped calibration set, one per picture, as a set of its own in ``folder``."""
    lines = []
    for line in CALIBRATION.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        turns = [turn for turn in entry["turns"] if turn["task"] == "describe"]
        if turns:
            lines.append(json.dumps({"image": str(CALIBRATION.parent / entry["image"]), "turns": turns}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def described(loaded: LoadedModel, count: int) -> trial.Streams:
    """``count`` descriptions of the eval set, as inputs of the first layer."""
    samples = [sample for sample in read_jsonl(SHIPPED) if "from left to right" in sample.turns[0][0]]
    return list(capture(loaded, [Sample(s.image, s.turns[:1]) for s in random.Random(0).sample(samples, min(count, len(samples)))]))


def asked(loaded: LoadedModel, count: int) -> trial.Streams:
    """``count`` questions of the eval set, the same number for every task, as make_results.py asks them."""
    questions = stratified(load_questions(SHIPPED), count)
    return list(capture(loaded, [Sample(q.image, ((q.question, q.expected),)) for q in questions]))


def divergences(reference: list[torch.Tensor], candidate: list[torch.Tensor]) -> list[torch.Tensor]:
    """KLD of every answer token, one tensor [tokens] per stream."""
    return [(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, candidate, strict=True)]


def figures(reference: list[torch.Tensor], candidate: list[torch.Tensor], streams: trial.Streams) -> dict[str, float]:
    """KLD with its standard error, exact match, and the number of questions."""
    kld = torch.cat(divergences(reference, candidate))
    exact = [bool((q.argmax(-1) == s.ids[s.labels]).all()) for q, s in zip(candidate, streams, strict=True)]
    return {
        "kld": float(kld.mean()),
        "error": float(kld.std()) / len(kld) ** 0.5,
        "median": float(kld.median()),
        "exact": sum(exact) / len(exact),
        "asked": len(exact),
    }


def scored(
    loaded: LoadedModel, reference: list[torch.Tensor], streams: trial.Streams, result: QuantiseResult, rotate: Rotate
) -> dict[str, Any]:
    """Figures with 16-bit activations and, if the type has one scale per row, with int8 ones and the difference."""
    plain = trial.answer_logits(loaded, streams, result, rotate)
    found: dict[str, Any] = figures(reference, plain, streams)
    if any(quantised.type_name in QUANT_TYPES for quantised in result.quantised.values()):
        int8 = trial.answer_logits(loaded, streams, result, rotate, int8=True)
        found["int8"] = figures(reference, int8, streams) | added(divergences(reference, plain), divergences(reference, int8))
    return found


def medians(ratios: dict[str, list[float]]) -> dict[str, float]:
    return {block: float(torch.tensor(values).quantile(0.5)) for block, values in ratios.items()}


def work(options: dict[str, Any], rows: list[str], number: Synchronized[int]) -> None:
    """Measure one row after another until none is left; a row that fails says so in its line."""
    torch.set_num_threads(1)
    trial_w4a8.register()
    loaded = load(options["model_dir"], options["device"])
    sets = {"scenes": asked(loaded, options["questions"]), "captions": described(loaded, options["questions"])}
    if options["photographs"]:
        sets["photographs"] = trial.photographs(loaded, options["photographs"])
    if options["text"]:
        sets["text"] = trial.text(loaded, options["text"])
    reference = {name: trial.answer_logits(loaded, streams, None, "none") for name, streams in sets.items()}
    keep_texts()
    while True:
        with number.get_lock():
            place = number.value
            number.value += 1
        if place >= len(rows):
            return
        start = time.perf_counter()
        row: dict[str, Any] = {"row": rows[place], "device": device_name(options["device"])}
        try:
            variant = trial.parsed(rows[place])
            calib = options["captions"] if variant.calib == "captions" else None
            samples = load_samples(calib, loaded, variant.samples, variant.seed, variant.turns)
            result = quantise(loaded, samples, variant.settings)
            row |= {"seconds": time.perf_counter() - start, "samples": len(samples), "bits": trial.bits(result), "stages": result.seconds}
            row |= {"ratios": medians(result.ratios), "exponents": result.exponents}
            for name, streams in sets.items():
                row[name] = scored(loaded, reference[name], streams, result, variant.settings.rotate)
        except Exception:  # the other rows go on; this one's line says why there are no figures
            row["failed"] = traceback.format_exc()
        with number.get_lock(), options["out"].open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: tuple(round(figure, 4) for figure in short(row[name])) for name in sets if name in row}
        print(f"{time.perf_counter() - start:6.1f} s  {rows[place] or 'default'}  {shown or row.get('failed', '')[-300:]}", flush=True)


def short(found: dict[str, Any]) -> list[float]:
    return [found["exact"], found["kld"], *([found["int8"]["kld"]] if "int8" in found else [])]


def keep_texts() -> None:
    """Let the model generate its texts once: they are the same for every row."""
    texts: dict[int, torch.Tensor] = {}
    write = walk.written  # type: ignore[attr-defined]

    def written(loaded: LoadedModel, count: int, progress: Callable[[int, int], None]) -> torch.Tensor:
        if count not in texts:
            texts[count] = write(loaded, count, progress)
        return texts[count]

    walk.written = written  # type: ignore[attr-defined]


def shown(row: str) -> str:
    """A row's name in the table, without what all rounded-to-nearest rows, or all plain GPTQ rows, have in common."""
    row = row.replace("turns=all", "turns=last,turns=all") if row.startswith("type_name=MBQ3,rounding=nearest") else row
    for base, name in ((NEAREST, "nearest"), (PLAIN, "plain GPTQ"), ("", "the default of MBQ3S")):
        if row.startswith(base):
            return ", ".join([name, *filter(None, row.removeprefix(base).split(","))])
    raise AssertionError("every row starts with nothing")


def render(rows: list[dict[str, Any]]) -> str:
    """The stored rows as the table of docs/results.md."""
    lines = ["| quantised with | exact match | KLD, scenes | captions | photographs | text |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        scores = [f"{row[kind]['kld']:.2g} ± {row[kind]['error']:.1g}" for kind in ("scenes", "captions", "photographs", "text")]
        scores[-1] += "" if row["text"]["of"] == "README.md" else " †"
        lines.append(f"| {shown(row['row'])} | {row['scenes']['exact']:.3f} | {' | '.join(scores)} |")
    return "\n".join(lines)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def finished(out: Path) -> set[str]:
    """The rows that ``out`` already has."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    return {row["row"] for row in map(json.loads, lines) if "failed" not in row}


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Number of processes.")
@click.option("--seconds", type=click.IntRange(min=1), default=420, show_default=True, help="Time limit.")
@click.option("--questions", default=204, show_default=True, help="Number of questions about scenes, of the demo's 612.")
@click.option("--photographs", type=click.Path(exists=True, path_type=Path), help="Folder written by photographs.py.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Text file to score.")
@click.option("--list", "list_", type=click.Choice(list(LISTS)), default="balance", show_default=True, help="List of rows to run.")
@click.option("--only", multiple=True, help="Run these rows instead, written as for trial_quality.py.")
def main(out: Path, jobs: int, seconds: int, list_: str, only: tuple[str, ...], **options: Any) -> None:
    """Quantise MODEL_DIR in PyTorch for every row, score the answers, and write OUT line by line."""
    end = time.monotonic() + seconds
    done = finished(out)
    rows = [row for row in (only or LISTS[list_]) if row not in done]
    options |= {"out": out, "captions": captions(out.parent)}
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    workers = [context.Process(target=work, args=(options, rows, number)) for _ in range(min(jobs, len(rows)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


if __name__ == "__main__":
    main()
