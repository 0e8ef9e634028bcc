#!/usr/bin/env python3
"""Measures the time to first token of prompts with pictures: one pass (--aifs on) against separate decodes (off), and pictures first
(reorder) against one pass, in interleaved rounds.

    python tools/bench_ttft.py --model FILE.gguf --mmproj MMPROJ.gguf          questions of the demo's set about one picture each
    python tools/bench_ttft.py --random 2B:MBQ3S,7B:F16 --gpu-layers 99        random weights in Qwen2-VL's shapes, tower too

"tower included" is the whole HTTP request to llama-server, with two servers side by side; "apart" is the language model alone: the prompt
with its encoded pictures, in this process. Flash attention is on.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from mbq_cbind.graph import devices
from mbq_cbind.model import Model
from mbq_gguf.errors import USER_ERRORS
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions, stratified
from mbq_gguf.llama_cpp.bindings import bind
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.llama_cpp.server import Server
from PIL import Image
from random_gguf import QWEN2_VL_2B, QWEN2_VL_7B, write_random_gguf, write_random_tower
from rich.console import Console
from rich.progress import track
from rich.table import Table

DEMO = Path(__file__).resolve().parents[1] / "converter" / "mbq_gguf" / "demo" / "data"
SHAPES = {"2B": QWEN2_VL_2B, "7B": QWEN2_VL_7B}
SIDES = {64: 224, 256: 448}  # tokens of a picture -> pixels a side
RANDOM_CASES = ((1, 256), (3, 256), (8, 64))  # pictures, tokens each
QUESTION = "What do these pictures show, and how do they differ?"
CONTEXT = 2048
MODES = ("off", "on", "reorder")


@dataclass(frozen=True)
class Prompt:
    """Pictures and the question after them."""

    pictures: tuple[Path, ...]
    question: str


@dataclass(frozen=True)
class Row:
    """Medians over the rounds in ms, and the ratio of the previous mode to this one: median, minimum and maximum over the rounds."""

    model: str
    case: str
    tower: str
    before: str
    mode: str
    before_ms: float
    mode_ms: float
    ratio: float
    least: float
    greatest: float
    rounds: int


def demo_tokenizer() -> tuple[dict[str, Any], int]:
    """The demo's tokenizer and chat template as GGUF metadata, and the number of its tokens."""
    file = json.loads((DEMO / "tokenizer.json").read_text())
    names = {number: token for token, number in file["model"]["vocab"].items()} | {t["id"]: t["content"] for t in file["added_tokens"]}
    special = {token["id"] for token in file["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    end = next(token["id"] for token in file["added_tokens"] if token["content"] == "<|im_end|>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [names[i] for i in range(len(names))],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(names))],  # control, normal
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (DEMO / "chat_template.jinja").read_text(),
    }, len(names)


@contextmanager
def random_model(name: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """The files for a shape and type such as 2B:MBQ3S, deleted afterwards."""
    size, _, mixture = name.partition(":")
    tokenizer, count = demo_tokenizer()
    shape = replace(SHAPES[size], vocabulary=count)
    model, mmproj = folder / f"{size}-{mixture}.gguf", folder / f"mmproj-{size}.gguf"
    write_random_gguf(model, shape, mixture, tokenizer)
    if not mmproj.is_file():
        write_random_tower(mmproj, shape.embedding)
    try:
        yield model, mmproj
    finally:
        model.unlink()


def noise(folder: Path, count: int, tokens: int) -> tuple[Path, ...]:
    """Pictures of random pixels that have that many tokens each."""
    paths = [folder / f"noise-{tokens}-{i}.png" for i in range(count)]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDES[tokens], SIDES[tokens], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tuple(paths)


def summary(model: str, case: str, tower: str, times: list[dict[str, float]]) -> list[Row]:
    """A row for each mode but the first, relative to the one before it, from the seconds of every round by mode."""
    rows = []
    for before, mode in pairwise(times[0]):
        ratios = [each[before] / each[mode] for each in times]
        medians = (round(1000 * statistics.median(each[name] for each in times), 2) for name in (before, mode))
        figures = (round(figure, 3) for figure in (statistics.median(ratios), min(ratios), max(ratios)))
        rows.append(Row(model, case, tower, before, mode, *medians, *figures, rounds=len(times)))
    return rows


def interleaved(
    prompts: Sequence[Prompt], modes: Sequence[str], rounds: int, run: Callable[[str, Prompt], float], title: str
) -> list[dict[str, float]]:
    """Seconds by mode, ``rounds`` times for each prompt; every other round is in reverse order. Warm-up runs are dropped."""
    for mode in modes:
        run(mode, prompts[0])
    tasks = [(prompt, number) for number in range(rounds) for prompt in prompts]
    times = []
    for prompt, number in track(tasks, title, console=Console(stderr=True), transient=True):
        seconds = {mode: run(mode, prompt) for mode in (modes if number % 2 else modes[::-1])}
        times.append({mode: seconds[mode] for mode in modes})
    return times


def over_http(
    files: tuple[Path, Path], options: list[str], modes: Sequence[str], cases: dict[str, list[Prompt]], rounds: int, name: str
) -> Iterator[Row]:
    """Whole requests to a server for each mode, tower included."""
    with ExitStack() as stack:
        servers = {mode: stack.enter_context(Server(*files, ["--no-ui", *options, "--aifs", mode])) for mode in modes}

        def run(mode: str, prompt: Prompt) -> float:
            return servers[mode].ask(prompt.pictures, prompt.question, 1).seconds

        for case, prompts in cases.items():
            yield from summary(name, case, "included", interleaved(prompts, modes, rounds, run, f"{name}, {case}, over HTTP"))


def in_process(
    files: tuple[Path, Path],
    threads: int | None,
    gpu_layers: int,
    modes: Sequence[str],
    cases: dict[str, list[Prompt]],
    rounds: int,
    name: str,
) -> Iterator[Row]:
    """The language model alone: the prompt with encoded pictures, to the logits of its last token."""
    with Model(*files, threads=threads, gpu_layers=gpu_layers, context=CONTEXT, aifs=True) as model:
        paths = {path for prompts in cases.values() for prompt in prompts for path in prompt.pictures}
        encoded = {path: model.vision.encode(path) for path in sorted(paths)}

        def run(mode: str, prompt: Prompt) -> float:
            model.text_logits([1], outputs=1)  # nothing of the last prompt is found again
            model.apart, model.reorder = "it is off" if mode == "off" else None, mode == "reorder"
            words = model.prompt(prompt.question, images=len(prompt.pictures))
            begin = time.perf_counter()
            model.logits(words, [encoded[path] for path in prompt.pictures], [1])
            return time.perf_counter() - begin

        for case, prompts in cases.items():
            yield from summary(name, case, "apart", interleaved(prompts, modes, rounds, run, f"{name}, {case}, apart"))


def show(rows: list[Row]) -> None:
    table = Table("model", "prompt", "tower", "modes", "before, ms", "mode, ms", "before / mode", "of rounds")
    for row in rows:
        spread = f"{row.least:.2f} to {row.greatest:.2f}"
        milliseconds = (f"{row.before_ms:.1f}", f"{row.mode_ms:.1f}")
        table.add_row(row.model, row.case, row.tower, f"{row.before}, {row.mode}", *milliseconds, f"{row.ratio:.3f}", spread)
    Console(width=140).print(table)


def device(gpu_layers: int) -> str:
    if not gpu_layers:
        return platform.processor() or platform.machine()
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


@click.command()
@click.option(
    "--model", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A language model, which is asked the demo's questions."
)
@click.option("--mmproj", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--random", "shapes", default="", help="Random models, for example 2B:MBQ3S,7B:F16.")
@click.option("--modes", default="off,on", show_default=True, help="Modes (off, on, reorder); each is compared with the one before it.")
@click.option("--tower", type=click.Choice(["both", "included", "apart"]), default="both", show_default=True)
@click.option("--questions", type=click.IntRange(min=1), default=18, show_default=True, help="Number of questions, spread over the tasks.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--work", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder for random models. [default: a temporary one]"
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for the rows; other rows in it are kept.")
def main(
    model: Path | None,
    mmproj: Path | None,
    shapes: str,
    modes: str,
    tower: str,
    questions: int,
    rounds: int,
    threads: int | None,
    gpu_layers: int,
    work: Path | None,
    output: Path | None,
) -> None:
    """Print the table, and store each row as soon as it is measured."""
    if (model is None) != (mmproj is None) or not (model or shapes):
        raise click.UsageError("give --model with its --mmproj, or --random")
    chosen = modes.split(",")
    if len(chosen) < 2 or not set(chosen) <= set(MODES):
        raise click.UsageError(f"--modes takes two or more of {', '.join(MODES)}")
    bind()
    click.echo(f"{find_program('llama-server')}, devices {', '.join(devices())}", err=True)
    if gpu_layers and not any(name.startswith("CUDA") for name in devices()):
        raise click.UsageError("--gpu-layers: this build has no GPU; set MBQ_GGUF_BACKEND=cuda for the CUDA build")
    options = ["--ctx-size", str(CONTEXT), "--parallel", "1", "--gpu-layers", str(gpu_layers)]
    options += ["--threads", str(threads)] if threads else []
    where = device(gpu_layers)
    rows: list[Row] = []

    def measure(name: str, files: tuple[Path, Path], cases: dict[str, list[Prompt]]) -> None:
        found = {
            "included": over_http(files, options, chosen, cases, rounds, name),
            "apart": in_process(files, threads, gpu_layers, chosen, cases, rounds, name),
        }
        for row in chain(*(found[kind] for kind in found if tower in (kind, "both"))):
            rows.append(row)
            if output is not None:
                store(output, [row], where)
        show([row for row in rows if row.model == name])

    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        if model is not None and mmproj is not None:
            asked = [Prompt((question.image,), question.question) for question in stratified(load_questions(SHIPPED), questions)]
            measure(model.stem, (model, mmproj), {f"{len(asked)} questions, 1 picture": asked})
        pictured = {f"{count} x {tokens}": [Prompt(noise(folder, count, tokens), QUESTION)] for count, tokens in RANDOM_CASES}
        for name in filter(None, shapes.split(",")):
            with random_model(name, folder) as files:
                measure(name, files, pictured)


def store(output: Path, rows: list[Row], where: str) -> None:
    """Write ``rows`` to the file, replacing those of the same model, prompt, modes and device."""
    command = shlex.join(["python", *sys.argv])
    new = [{**asdict(row), "device": where, "date": datetime.now(UTC).date().isoformat(), "command": command} for row in rows]
    key = ("device", "model", "case", "tower", "before", "mode")
    taken = {tuple(row[name] for name in key) for row in new}
    old = json.loads(output.read_text()) if output.is_file() else []
    kept = [row for row in old if tuple(row[name] for name in key) not in taken]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([*kept, *new], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
