#!/usr/bin/env python3
"""Profiles a pass of a vision tower (Qwen2-VL's, random weights) on a GPU: from its first kernel to its last, and by kernel.

    python tools/profile_tower.py --towers F16,W8A8,W4A8 --output tower.json
    python tools/profile_tower.py --towers F16 --language 7B:W4A8,7B:MBQ3S      and a prompt with one encoded picture, in one pass

torch's profiler records the kernels of the whole process, so torch with CUDA is needed beside the CUDA build. Some kernels start before the
previous one has ended and wait for it, so times by kernel add up to more than the pass. The profiler delays the launch of a CUDA graph by
0.4 to 1 ms (docs/log.md, 2026-11-29), so use bench_tower.py to compare towers.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import bench_ttft
import click
import torch
from bench_tower import CONTEXT, SIDES, answered, forget
from bench_ttft import QUESTION, SHAPES, demo_tokenizer, noise
from mbq_cbind.model import Model
from mbq_gguf.llama_cpp.bindings import bind
from random_gguf import LanguageShape, write_random_gguf, write_random_tower
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def seconds(model: Model, picture: Path) -> float:
    begin = time.perf_counter()
    model.vision.encode(picture)
    return time.perf_counter() - begin


def profiled(run: Callable[[], float], trace: Path, before: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Profile ``run``, which returns its seconds. Milliseconds of the whole call (median of 7, without profiler), on the GPU from the first
    kernel to the last, idle time in between, and by kernel. ``before`` runs before each and is not measured.
    """
    times = []
    for _ in range(10):
        before()
        times.append(run())
    before()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    found.export_chrome_trace(str(trace))
    return {"call": 1000 * statistics.median(times[3:]), **of_events(json.loads(trace.read_text())["traceEvents"])}


def of_events(trace: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds on the GPU of a trace's events, whose times are in us."""
    events = sorted((event for event in trace if event.get("cat") in KINDS), key=lambda event: event["ts"])
    times, counts = Counter[str](), Counter[str]()
    end, idle = events[0]["ts"], 0.0
    for event in events:
        idle += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
        name = re.sub(r"^void |[<(].*", "", event["name"])
        times[name] += event["dur"] / 1000
        counts[name] += 1
    rows = [{"kernel": name, "ms": total, "count": counts[name]} for name, total in times.most_common()]
    return {"card": (end - events[0]["ts"]) / 1000, "idle": idle / 1000, "count": len(events), "kernels": rows}


def printed(title: str, found: dict[str, Any]) -> Table:
    of_all = f"{found['card']:.2f} ms on the card, of these {found['idle']:.2f} idle, {found['call']:.2f} in all"
    table = Table("kernel", "ms", "times", title=f"{title}: {of_all}")
    for row in found["kernels"][:20]:
        table.add_row(row["kernel"], f"{row['ms']:.3f}", str(row["count"]))
    return table


def towers(folder: Path, kinds: list[str], width: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each tower's pass over a picture of each size, beside a language model of one layer."""
    tokenizer, count = demo_tokenizer()
    text, mmproj = folder / "one-layer.gguf", folder / "mmproj.gguf"
    write_random_gguf(text, LanguageShape(1, width, 256, width // 128, 1, count), "F16", tokenizer)
    for kind in kinds:
        write_random_tower(mmproj, width, kind)
        with Model(text, mmproj, context=CONTEXT, gpu_layers=99) as model:
            for tokens in SIDES:
                run = partial(seconds, model, noise(folder, 1, tokens)[0])
                yield f"{kind}, {tokens} tokens", profiled(run, folder / "trace.json")


def prompts(folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each language model's prompt with one picture of each size."""
    tokenizer, count = demo_tokenizer()
    text, mmproj = folder / "language.gguf", folder / "mmproj.gguf"
    for name in names:
        size, _, mixture = name.partition(":")
        shape = replace(SHAPES[size], vocabulary=count)
        write_random_gguf(text, shape, mixture, tokenizer)
        write_random_tower(mmproj, shape.embedding)
        with Model(text, mmproj, context=CONTEXT, aifs=True, gpu_layers=99) as model:
            for tokens in SIDES:
                image = model.vision.encode(noise(folder, 1, tokens)[0])
                run = partial(answered, model, model.prompt(QUESTION), image)
                yield f"{name}, a picture of {tokens} tokens", profiled(run, folder / "trace.json", partial(forget, model))


@click.command()
@click.option("--towers", "kinds", default="F16,W8A8,W4A8", show_default=True)
@click.option("--language", "names", default="", help="Random language models, for example 7B:F16,7B:W4A8.")
@click.option("--width", type=int, default=3584, show_default=True, help="Width of the language model beside a tower.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
def main(kinds: str, names: str, width: int, output: Path | None) -> None:
    """Print a table for each type and size."""
    bind()
    bench_ttft.SIDES.update(SIDES)
    torch.zeros(1, device="cuda")  # before the other library starts the driver
    all_found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for title, found in chain(towers(folder, kinds.split(","), width), prompts(folder, list(filter(None, names.split(","))))):
            all_found[title] = found
            Console(width=140).print(printed(title, found))
    if output:
        output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "passes": all_found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
