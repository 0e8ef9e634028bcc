#!/usr/bin/env python3
"""When the host calls the CUDA runtime during a pass of a vision tower (Qwen2-VL's, random weights), and how long its CUDA graph takes.

    python tools/tower_timeline.py --towers F16,W8A8 --tokens 1024

Times are in ms from the beginning of the pass, which starts with the preprocessed picture: medians over the rounds whose calls are those of
most rounds. It needs Linux, a C compiler and a CUDA build of llama.cpp. profile_tower.py tells of single kernels, but its profiler delays
CUDA graphs.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import bench_ttft
import click
from bench_tower import CONTEXT, SIDES, listed, prepared
from bench_ttft import demo_tokenizer, noise
from mbq_cbind.model import Model
from mbq_gguf.llama_cpp.bindings import bind
from random_gguf import LanguageShape, write_random_gguf, write_random_tower
from rich.console import Console
from rich.table import Table

SOURCE = Path(__file__).with_name("cuda_timeline.c")
LIBRARY = "MBQ_TIMELINE"  # environment: where the compiled recorder is


@dataclass(frozen=True)
class Call:
    """One call of the CUDA runtime: ms from the beginning of the pass, bytes of a copy, the GPU's ms for a CUDA graph."""

    name: str
    begin: float
    end: float
    bytes: int
    gpu: float


def compiled(folder: Path) -> Path:
    library = folder / "cuda_timeline.so"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def recorded(library: ctypes.CDLL, run: Callable[[], object]) -> list[Call]:
    """The calls that ``run`` makes."""
    library.timeline_start.restype = ctypes.c_double
    start = library.timeline_start()
    run()
    name, begin, end = ctypes.c_char_p(), ctypes.c_double(), ctypes.c_double()
    size, gpu = ctypes.c_size_t(), ctypes.c_float()
    calls: list[Call] = []
    while library.timeline_read(len(calls), *(ctypes.byref(out) for out in (name, begin, end, size, gpu))):
        calls.append(Call((name.value or b"").decode(), begin.value - start, end.value - start, size.value, gpu.value))
    return calls


def median_of(passes: Sequence[Sequence[Call]]) -> list[Call]:
    """Call by call, of the passes whose calls have the names and sizes of most passes."""
    kinds = [tuple((call.name, call.bytes) for call in calls) for calls in passes]
    usual = Counter(kinds).most_common(1)[0][0]
    alike = [calls for calls, kind in zip(passes, kinds, strict=True) if kind == usual]
    return [
        Call(name, *(statistics.median(getattr(calls[i], what) for calls in alike) for what in ("begin", "end")), size, _gpu(alike, i))
        for i, (name, size) in enumerate(usual)
    ]


def _gpu(passes: Sequence[Sequence[Call]], i: int) -> float:
    return statistics.median(calls[i].gpu for calls in passes)


def table_of(title: str, calls: Sequence[Call]) -> Table:
    table = Table("call", "begin, ms", "end, ms", "bytes", "GPU, ms", title=title)
    for call in calls:
        table.add_row(call.name, f"{call.begin:.3f}", f"{call.end:.3f}", str(call.bytes or ""), f"{call.gpu:.3f}" if call.gpu else "")
    return table


@click.command()
@click.option("--towers", "kinds", default="F16,W8A8", show_default=True, callback=listed, help="Types.")
@click.option("--tokens", type=click.Choice(["256", "1024"]), default="1024", show_default=True, help="Of the picture.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Five more before them warm up.")
def main(kinds: list[str], tokens: str, rounds: int) -> None:
    """Print a table of each tower."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if LIBRARY not in os.environ:  # the recorder has to be there before the CUDA runtime: once more, with it
            library = compiled(folder)
            preload = " ".join([str(library), *os.environ.get("LD_PRELOAD", "").split()])
            environment = {**os.environ, LIBRARY: str(library), "LD_PRELOAD": preload}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
        recorder = ctypes.CDLL(os.environ[LIBRARY])
        bind()
        bench_ttft.SIDES.update(SIDES)
        tokenizer, count = demo_tokenizer()
        text, picture = folder / "one-layer.gguf", noise(folder, 1, int(tokens))[0]
        write_random_gguf(text, LanguageShape(1, 3584, 256, 28, 1, count), "F16", tokenizer)
        for kind in kinds:
            mmproj = folder / f"mmproj-{kind}.gguf"
            write_random_tower(mmproj, 3584, kind)
            with ExitStack() as stack:
                model = stack.enter_context(Model(text, mmproj, context=CONTEXT, gpu_layers=99))
                run = stack.enter_context(prepared(model.vision, picture))
                passes = [recorded(recorder, run) for _ in range(rounds + 5)][5:]
            Console(width=100).print(table_of(f"{kind}, {tokens} tokens", median_of(passes)))


if __name__ == "__main__":
    main()
