#!/usr/bin/env python3
"""Measures a vision tower by its type, and the first token after one picture: tower and language model separately, with random weights.

    python tools/bench_tower.py --gpu-layers 99                                     Qwen2-VL's tower, 256 and 1024 tokens per picture
    python tools/bench_tower.py --tokens 1024 --gpu-layers 99                       one size, so that every picture reuses the graph
    python tools/bench_tower.py --language 7B:F16,7B:Q4_K_M,7B:W4A8 --gpu-layers 99    and prompts with one picture for a 7B

Rounds are interleaved: each measures every type once, in alternating order. Flash attention is on. The tower's time starts with the
preprocessed picture. With --language, each model is measured with the picture's embeddings in its prompt, in one pass, and the last table
adds every tower to every language model.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_ttft
import click
from bench_ttft import QUESTION, SHAPES, demo_tokenizer, device, noise
from mbq_cbind.model import Model
from mbq_cbind.vision import EncodedImage, Vision
from mbq_gguf.llama_cpp.bindings import bind
from random_gguf import MIXTURES, TOWERS, LanguageShape, write_random_gguf, write_random_tower
from rich.console import Console
from rich.progress import track
from rich.table import Table

SIDES = {256: 448, 1024: 896}  # tokens of a picture -> pixels a side
CONTEXT = 1536
Timed = dict[tuple[str, int], list[float]]  # seconds of every round by name and tokens of the picture


def rounds_of(runs: dict[tuple[str, int], Callable[[], float]], rounds: int, title: str) -> Timed:
    """The seconds that each of ``runs`` returns, in every round, after one round to warm up."""
    found: Timed = {key: [] for key in runs}
    keys = list(runs)
    for number in track(range(rounds + 1), title, console=Console(stderr=True), transient=True):
        turn = number % len(keys)
        for key in keys[turn:] + keys[:turn]:
            seconds = runs[key]()
            if number:
                found[key].append(seconds)
    return found


@contextmanager
def prepared(vision: Vision, picture: Path) -> Iterator[Callable[[], float]]:
    """Reads and preprocesses the picture; the result is a function that encodes it and returns the seconds."""
    c = vision._binding.c
    with vision._cut(vision._bitmap(picture), among=1) as (handle,):

        def run() -> float:
            begin = time.perf_counter()
            if c.mtmd_encode_chunk(vision._context, handle) != 0:
                raise click.ClickException(f"the vision tower failed on {picture}: look at the messages above")
            return time.perf_counter() - begin

        yield run


def towers(folder: Path, kinds: list[str], sizes: list[int], width: int, rounds: int, options: dict[str, Any]) -> Timed:
    """Seconds of the tower alone, beside a language model of one layer."""
    tokenizer, count = demo_tokenizer()
    text = folder / "one-layer.gguf"
    write_random_gguf(text, LanguageShape(1, width, 256, width // 128, 1, count), "F16", tokenizer)
    pictures = {tokens: noise(folder, 1, tokens)[0] for tokens in sizes}
    with ExitStack() as stack:
        runs: dict[tuple[str, int], Callable[[], float]] = {}
        for kind in kinds:
            mmproj = folder / f"mmproj-{kind}.gguf"
            write_random_tower(mmproj, width, kind)
            model = stack.enter_context(Model(text, mmproj, context=CONTEXT, **options))
            mmproj.unlink()
            for tokens, picture in pictures.items():
                runs[kind, tokens] = stack.enter_context(prepared(model.vision, picture))
        return rounds_of(runs, rounds, "towers")


def forget(model: Model) -> None:
    """Clear everything that could be reused from the last prompt."""
    model.text_logits([1], outputs=1)


def answered(model: Model, words: str, image: EncodedImage) -> float:
    """Seconds of a prompt with one encoded picture, to the logits of its last token."""
    begin = time.perf_counter()
    model.logits(words, [image], [1])
    return time.perf_counter() - begin


def languages(folder: Path, names: list[str], sizes: list[int], rounds: int, options: dict[str, Any]) -> Timed:
    """Seconds of a prompt with one encoded picture, to the logits of its last token."""
    tokenizer, count = demo_tokenizer()
    pictures = {tokens: noise(folder, 1, tokens)[0] for tokens in sizes}
    with ExitStack() as stack:
        runs: dict[tuple[str, int], Callable[[], float]] = {}
        for name in names:
            size, _, mixture = name.partition(":")
            shape = replace(SHAPES[size], vocabulary=count)
            text, mmproj = folder / f"{size}-{mixture}.gguf", folder / f"mmproj-{size}.gguf"
            write_random_gguf(text, shape, mixture, tokenizer)
            if not mmproj.is_file():
                write_random_tower(mmproj, shape.embedding)
            model = stack.enter_context(Model(text, mmproj, context=CONTEXT, aifs=True, **options))
            text.unlink()
            for tokens, picture in pictures.items():
                image, words = model.vision.encode(picture), model.prompt(QUESTION)

                def run(model: Model = model, words: str = words, image: EncodedImage = image) -> float:
                    forget(model)
                    return answered(model, words, image)

                runs[name, tokens] = run
        return rounds_of(runs, rounds, "language models")


def table_of(title: str, times: Timed, against: str) -> Table:
    """Median, minimum and maximum in ms, and the speed relative to ``against`` (median of the ratios within a round)."""
    table = Table("", "tokens", "ms", "least to greatest", f"times {against}'s speed", title=title)
    for (name, tokens), seconds in sorted(times.items(), key=lambda item: item[0][1]):
        ratios = [base / mine for base, mine in zip(times[against, tokens], seconds, strict=True)]
        spread = f"{1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}"
        table.add_row(name, str(tokens), f"{1000 * statistics.median(seconds):.2f}", spread, f"{statistics.median(ratios):.3f}")
    return table


def together(of_towers: Timed, of_languages: Timed) -> Table:
    """The sum of the medians of every tower and language model, and the speed relative to the first pair."""
    table = Table(
        "language model", "tower", "tokens", "tower, ms", "language, ms", "first token, ms", "times the first", title="first token"
    )
    for tokens in sorted({at for _, at in of_towers}):
        first = None
        for (name, at), language in of_languages.items():
            for (kind, also), tower in of_towers.items():
                if at == also == tokens:
                    parts = [1000 * statistics.median(tower), 1000 * statistics.median(language)]
                    first = first or sum(parts)
                    table.add_row(name, kind, str(tokens), *(f"{part:.2f}" for part in (*parts, sum(parts))), f"{first / sum(parts):.3f}")
    return table


def listed(_: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """The names in ``value``; a name without a random model is refused before any time is spent on the others."""
    of_towers = parameter.name == "kinds"
    names = value.split(",") if value or of_towers else []
    known = TOWERS if of_towers else [f"{size}:{mixture}" for size in SHAPES for mixture in MIXTURES]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"there is no {name!r}: choose of {', '.join(known)}")
    return names


@click.command()
@click.option(
    "--towers",
    "kinds",
    default="F16,Q8_0,W8A8,W4A8",
    show_default=True,
    callback=listed,
    help="Types of the tower; the others are compared with the first.",
)
@click.option("--language", "models", default="", callback=listed, help="Random language models, for example 7B:F16,7B:W4A8.")
@click.option(
    "--tokens",
    "sizes",
    type=click.Choice(["256,1024", "256", "1024"]),
    default="256,1024",
    show_default=True,
    help="Tokens per picture; two sizes alternate.",
)
@click.option("--width", type=int, default=3584, show_default=True, help="Width of the language model, if none is given.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write all times to this JSON file.")
def main(
    kinds: list[str], models: list[str], sizes: str, width: int, rounds: int, threads: int | None, gpu_layers: int, output: Path | None
) -> None:
    """Print the tables."""
    bind()
    bench_ttft.SIDES.update(SIDES)
    options = {"threads": threads, "gpu_layers": gpu_layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = [int(size) for size in sizes.split(",")]
        of_towers = towers(folder, kinds, tokens, width, rounds, options)
        Console(width=140).print(table_of("tower", of_towers, kinds[0]))
        of_languages = languages(folder, models, tokens, rounds, options) if models else {}
    if models:
        Console(width=140).print(table_of("language model", of_languages, models[0]), together(of_towers, of_languages))
    if output:
        rows = [{"name": name, "tokens": tokens, "seconds": found} for (name, tokens), found in {**of_towers, **of_languages}.items()]
        about = {"device": device(gpu_layers), "date": datetime.now(UTC).date().isoformat(), "command": shlex.join(["python", *sys.argv])}
        output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
