#!/usr/bin/env python3
"""What a pass of a vision tower (Qwen2-VL's, random weights) spends on a card: from its first kernel to its last, and by kernel.

    python tools/profile_tower.py --towers F16,W8A8,W4A8 --output tower.json

torch's profiler counts the kernels of the whole process, so it needs torch with CUDA beside the CUDA build. Some kernels begin before the
one in front of them has ended and wait for it, so times by kernel add up to more than the pass.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bench_ttft
import click
import torch
from bench_tower import CONTEXT, SIDES
from bench_ttft import demo_tokenizer, noise
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


def profiled(model: Model, picture: Path, trace: Path) -> dict[str, Any]:
    """A pass: milliseconds of the whole call (median of 7, unprofiled), on the card, and by kernel."""
    for _ in range(3):
        seconds(model, picture)
    whole = statistics.median(seconds(model, picture) for _ in range(7))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds(model, picture)
        torch.cuda.synchronize()
    found.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") in KINDS]
    times, counts = Counter[str](), Counter[str]()
    for event in events:
        name = re.sub(r"^void |[<(].*", "", event["name"])
        times[name] += event["dur"] / 1000
        counts[name] += 1
    span = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    rows = [{"kernel": name, "ms": total, "count": counts[name]} for name, total in times.most_common()]
    return {"call": 1000 * whole, "card": span / 1000, "count": len(events), "kernels": rows}


def printed(title: str, found: dict[str, Any]) -> Table:
    table = Table("kernel", "ms", "times", title=f"{title}: {found['card']:.2f} ms on the card, {found['call']:.2f} ms in all")
    for row in found["kernels"][:20]:
        table.add_row(row["kernel"], f"{row['ms']:.3f}", str(row["count"]))
    return table


@click.command()
@click.option("--towers", "kinds", default="F16,W8A8,W4A8", show_default=True)
@click.option("--width", type=int, default=3584, show_default=True, help="Of the language model.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write everything as JSON.")
def main(kinds: str, width: int, output: Path | None) -> None:
    """Print a table for each type and size."""
    bind()
    bench_ttft.SIDES.update(SIDES)
    torch.zeros(1, device="cuda")  # before the other library starts the driver
    all_found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer, count = demo_tokenizer()
        text, mmproj = folder / "one-layer.gguf", folder / "mmproj.gguf"
        write_random_gguf(text, LanguageShape(1, width, 256, width // 128, 1, count), "F16", tokenizer)
        for kind in kinds.split(","):
            write_random_tower(mmproj, width, kind)
            with Model(text, mmproj, context=CONTEXT, gpu_layers=99) as model:
                for tokens in SIDES:
                    title = f"{kind}, {tokens} tokens"
                    all_found[title] = profiled(model, noise(folder, 1, tokens)[0], folder / "trace.json")
                    Console(width=140).print(printed(title, all_found[title]))
    if output:
        output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "passes": all_found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
