#!/usr/bin/env python3
"""Measures what quantising the activations of W4A8's products costs in prompts: dynamic, static, and skipped (a bound with wrong answers).

    python tools/bench_activations.py                                      this CPU: a few seconds per round
    MBQ_GGUF_BACKEND=cuda python tools/bench_activations.py --gpu          single products, launches and 7B prompts too: 7 minutes

Weights are random. A library of the build is relinked with one file replaced; the build itself is unchanged (relinked.py).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click
from activations import on_cpu, print_prompts
from activations_gpu import on_gpu
from bench_cpu import processor
from bench_gpu import run
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import paths
from one_type_gguf import FFN, HEADS, HIDDEN, KV_HEADS, VOCABULARY
from random_gguf import LanguageShape
from rich.console import Console


@click.command(context_settings={"show_default": True})
@click.option("--gpu", is_flag=True, help="Measure on the first GPU with a 7B's shapes; the other options are for the CPU.")
@click.option("--layers", default=8, type=click.IntRange(1), help="Layers of the random model with Qwen2-VL-2B's shapes.")
@click.option("--rounds", default=31, type=click.IntRange(1), help="Rounds in which all three are measured; medians are shown.")
@click.option("--prompt", default=512, type=click.IntRange(65), help="Tokens of the prompt; up to 64 are always dynamic.")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(1), help="Threads of llama-bench.")
@click.option(
    "--work", type=click.Path(file_okay=False, path_type=Path), help="Folder for the models (9 GB with --gpu). [default: a temporary one]"
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all measurements to this JSON file.")
def main(gpu: bool, layers: int, rounds: int, prompt: int, threads: int, work: Path | None, out: Path | None) -> None:
    """Measure prompts, and products with --gpu, and print the tables."""
    console = Console(width=150)
    record = {"date": datetime.now(UTC).date().isoformat(), "command": shlex.join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        if gpu:
            record |= {"device": run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()[0]}
            on_gpu(paths.find_program("llama-bench").parent, folder, record, out or folder / "record.json", console)
            return
        rows = on_cpu(folder, LanguageShape(layers, HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY), prompt, threads, rounds)
        print_prompts(console, rows, f"{processor()}, {threads} threads, {layers} layers")
        if out is not None:
            out.write_text(
                json.dumps({**record, "processor": processor(), "threads": threads, "layers": layers, "prompts": rows}, indent=1)
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
