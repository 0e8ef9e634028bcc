#!/usr/bin/env python3
"""Measures the generation of calibration texts, alone and beside a busy process: wall time and ratio.

    python tools/bench_texts.py MODEL
    python tools/bench_texts.py MODEL --beside 2 --wait active

In each round, the model in the directory MODEL generates the first tokens of its texts twice: alone, and beside a process that multiplies
matrices with that many threads. The order alternates. On two cores, one busy thread leaves one and a half cores, so 1.33 is a fair ratio;
two busy threads leave one core, which makes it 2. Threads wait passively, as in `convert`, or spin (--wait active). Nothing else should
run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbq_gguf.models import LoadedModel

COMPUTES = "import sys, torch; torch.set_num_threads(int(sys.argv[1])); a = torch.randn(1024, 1024); print(flush=True)\nwhile True: a @ a"
FORCED = "BENCH_TEXTS_WAITS"  # set in the process whose threads wait as requested: OpenMP reads its variables once, when it is loaded


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """While open, another process multiplies matrices with that many threads."""
    command = [sys.executable, "-c", COMPUTES, str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has started
        try:
            yield
        finally:
            process.kill()


def seconds(loaded: LoadedModel, texts: int, tokens: int) -> float:
    """Wall time for that many tokens of each text."""
    from mbq_gguf.calibration.generate import written_texts
    from mbq_gguf.calibration.precision import coarse_products
    from mbq_gguf.calibration.synthetic import SEED, TEMPERATURE

    start = time.perf_counter()
    with coarse_products(loaded.device):
        written_texts(loaded, texts, tokens, TEMPERATURE, SEED, lambda done, total: None)
    return time.perf_counter() - start


@click.command(help=__doc__, context_settings={"max_content_width": 140})
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--beside", default=1, show_default=True, help="Threads of the other process.")
@click.option("--texts", default=80, show_default=True, help="Number of texts, as convert's --synthetic.")
@click.option("--tokens", default=24, show_default=True, help="Tokens per text; convert generates 128.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--wait", type=click.Choice(["passive", "active"]), default="passive", show_default=True, help="How OpenMP's threads wait.")
def main(model: Path, beside: int, texts: int, tokens: int, rounds: int, wait: str) -> None:
    if os.environ.get(FORCED) != wait:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": wait, FORCED: wait})
    from mbq_gguf.models import load

    loaded = load(model)
    seconds(loaded, texts, 3)  # imports and pages
    alone, shared = [], []
    for number in range(rounds):
        for others in (0, beside) if number % 2 == 0 else (beside, 0):
            with busy(others) if others else nullcontext():
                (shared if others else alone).append(seconds(loaded, texts, tokens))
    ratios = [there / here for here, there in zip(alone, shared, strict=True)]
    print(f"{texts} texts, {tokens} tokens each, threads wait {wait}: alone {statistics.median(alone):.1f} s,", end=" ")
    print(f"beside {beside} busy thread{'s' if beside > 1 else ''} {statistics.median(shared):.1f} s;", end=" ")
    print(f"ratio {statistics.median(ratios):.2f} (" + ", ".join(f"{ratio:.2f}" for ratio in ratios) + ")")


if __name__ == "__main__":
    main()
