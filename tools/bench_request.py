#!/usr/bin/env python3
"""Measures where the time of a request about pictures goes: reading, vision tower, language model, and the rest.

    python tools/bench_request.py --gpu-layers 99

Uses random weights in Qwen2-VL's shapes and pictures of random pixels. In this process, a picture is read (PNG and SHA-256), preprocessed,
and passed through towers of 1, 16 and 32 blocks, which separates the time of a block from that of the rest. Over HTTP, it measures the
whole request, the slot's own time (tower and language model), and the rest (transfer, JSON, base64, reading, preprocessing).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import random_gguf
from bench_tower import prepared
from bench_ttft import CONTEXT, QUESTION, RANDOM_CASES, SHAPES, SIDES, demo_tokenizer, noise
from mbq_cbind.model import Model
from mbq_cbind.vision import Vision
from mbq_gguf.errors import USER_ERRORS
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.bindings import bind
from mbq_gguf.llama_cpp.server import Server, data_url
from random_gguf import write_random_gguf, write_random_tower

BLOCKS = (1, 16, 32)


def middle(run: Callable[[], object], rounds: int) -> str:
    """Milliseconds of a run: median, minimum and maximum, after one run to warm up."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return f"{statistics.median(times[1:]):.2f} ms ({min(times[1:]):.2f} to {max(times[1:]):.2f})"


def preprocess(vision: Vision, bitmap: Any) -> None:
    with vision._tokenized(vision.marker, [bitmap]):
        pass


def picture_parts(vision: Vision, picture: Path, rounds: int) -> dict[str, str]:
    """The times of reading, preprocessing and encoding one picture."""
    bitmap = vision._bitmap(picture)
    with prepared(vision, picture) as run:
        tower = middle(run, rounds)
    read, preprocessed = middle(lambda: vision._bitmap(picture), rounds), middle(lambda: preprocess(vision, bitmap), rounds)
    return {"read": read, "preprocessed": preprocessed, "tower": tower}


def parts(text: Path, towers: dict[int, Path], folder: Path, rounds: int, gpu_layers: int) -> None:
    """Print the times of a picture in this process, with each of the towers."""
    for blocks, mmproj in towers.items():
        with Model(text, mmproj, context=CONTEXT, gpu_layers=gpu_layers) as model:
            for tokens in SIDES:
                found = picture_parts(model.vision, noise(folder, 1, tokens)[0], rounds)
                click.echo(f"{tokens} tokens, {blocks} blocks: " + ", ".join(f"{name} {took}" for name, took in found.items()))


def requests(text: Path, mmproj: Path, folder: Path, rounds: int, options: list[str]) -> None:
    """Print the times of a request over HTTP; the first rounds warm up."""
    with Server(text, mmproj, ["--no-ui", "--ctx-size", str(CONTEXT), "--parallel", "1", *options]) as server:
        for count, tokens in RANDOM_CASES:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": data_url(path)}} for path in noise(folder, count, tokens)
            ]
            message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
            body = json.dumps({"messages": [message], "max_tokens": 1, "temperature": 0, "cache_prompt": False}).encode()
            whole, slot = [], []
            for _ in range(rounds + 2):
                begin = time.perf_counter()
                reply = lockdown.request("POST", f"{server.url}/v1/chat/completions", server.key, 60, body)
                whole.append(1000 * (time.perf_counter() - begin))
                reply.raise_for_status()
                slot.append(float(reply.json()["timings"]["prompt_ms"]))
            rest = [all_of_it - part for all_of_it, part in zip(whole[2:], slot[2:], strict=True)]
            middles = (statistics.median(times) for times in (whole[2:], slot[2:], rest))
            click.echo("{} x {}: request {:.1f} ms, slot {:.1f}, rest {:.1f}".format(count, tokens, *middles))


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="2B", show_default=True)
@click.option("--type", "kind", default="W4A8", show_default=True, help="Type of the language model.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True)
def main(shape: str, kind: str, rounds: int, gpu_layers: int) -> None:
    """Print the times."""
    bind()
    tokenizer, count = demo_tokenizer()
    language, (_, size) = replace(SHAPES[shape], vocabulary=count), random_gguf.TOWER
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, towers = folder / "text.gguf", {blocks: folder / f"mmproj-{blocks}.gguf" for blocks in BLOCKS}
        write_random_gguf(text, language, kind, tokenizer)
        for blocks, mmproj in towers.items():
            random_gguf.TOWER = (blocks, size)
            write_random_tower(mmproj, language.embedding)
        parts(text, towers, folder, rounds, gpu_layers)
        requests(text, towers[BLOCKS[-1]], folder, rounds, ["--gpu-layers", str(gpu_layers)])


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
