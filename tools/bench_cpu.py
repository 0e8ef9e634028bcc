"""Measures token generation and prompt processing of quant types on this CPU, with llama-bench and random weights."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp import paths
from one_type_gguf import FILE_TYPES, bits_per_weight, prepare_models, run
from rich.console import Console
from rich.table import Table

BASELINE = "Q3_K"


@dataclass(frozen=True)
class Row:
    """Results for one type. Tokens per second are medians over the rounds; so are the ratios, each taken within one round."""

    name: str
    bits_per_weight: float  # of the layers' matrices
    model_bytes: int
    generation: float
    generation_ratio: float | None  # relative to the baseline; None if that was not measured
    generation_spread: float  # (largest - smallest) / median over the rounds
    prompt: float
    prompt_ratio: float | None
    prompt_spread: float
    bandwidth_share: float  # bytes of weights read per second in generation / measured bandwidth


def memory_bandwidth(threads: int, megabytes: int = 512, passes: int = 15) -> float:
    """Bytes per second that ``threads`` threads together read from arrays far larger than the caches (the best of ``passes``)."""
    arrays = [np.ones(megabytes * 2**20 // threads // 8, np.int64) for _ in range(threads)]
    start = threading.Barrier(threads)
    times = np.empty((threads, passes, 2))

    def read(thread: int) -> None:
        for number in range(passes):
            start.wait()
            times[thread, number, 0] = time.perf_counter()
            np.maximum.reduce(arrays[thread])  # numpy releases the interpreter lock here, and uses vector instructions
            times[thread, number, 1] = time.perf_counter()

    workers = [threading.Thread(target=read, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    durations = times[:, :, 1].max(axis=0) - times[:, :, 0].min(axis=0)
    return float(sum(array.nbytes for array in arrays) / durations.min())


def measure(models: dict[str, Path], prompt: int, generate: int, rounds: int, threads: int, console: Console) -> list[dict[str, Any]]:
    """The results of ``rounds`` runs of llama-bench, each of which measures all models in turn."""
    command: list[str | Path] = [paths.find_program("llama-bench"), "-o", "json", "-t", str(threads), "-r", "1", "-ngl", "0"]
    command += ["-p", str(prompt), "-n", str(generate)]
    for model in models.values():
        command += ["-m", model]
    names = {str(model): name for name, model in models.items()}
    results = []
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for result in json.loads(run(command)):
            results.append({"name": names[result["model_filename"]], "round": number, **result})
    return results


def tabulate(models: dict[str, Path], results: Sequence[dict[str, Any]], bandwidth: float) -> list[Row]:
    """One row for each type, from the results of :func:`measure`."""

    def speeds(name: str, count: str) -> list[float]:
        return [result["avg_ts"] for result in results if result["name"] == name and result[count]]

    def ratio(name: str, count: str) -> float | None:
        pairs = zip(speeds(name, count), speeds(BASELINE, count), strict=False)
        return statistics.median(mine / base for mine, base in pairs) if BASELINE in models else None

    rows = []
    for name, model in models.items():
        generation, prompt = speeds(name, "n_gen"), speeds(name, "n_prompt")
        size = next(result["model_size"] for result in results if result["name"] == name)
        rows.append(
            Row(
                name=name,
                bits_per_weight=bits_per_weight(model),
                model_bytes=size,
                generation=statistics.median(generation),
                generation_ratio=ratio(name, "n_gen"),
                generation_spread=_spread(generation),
                prompt=statistics.median(prompt),
                prompt_ratio=ratio(name, "n_prompt"),
                prompt_spread=_spread(prompt),
                bandwidth_share=statistics.median(generation) * size / bandwidth,
            )
        )
    return rows


def print_table(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the rows. A spread far above the difference between two types means that the machine was not quiet."""
    table = Table(title=title)
    for heading in ("type", "bits/weight", "tg t/s", f"/ {BASELINE}", "spread", "pp t/s", f"/ {BASELINE}", "spread", "bandwidth"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for row in rows:
        ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in (row.generation_ratio, row.prompt_ratio)]
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.2f}",
            f"{row.generation:.1f}",
            ratios[0],
            f"{row.generation_spread:.0%}",
            f"{row.prompt:.0f}",
            ratios[1],
            f"{row.prompt_spread:.0%}",
            f"{row.bandwidth_share:.0%}",
        )
    console.print(table)


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _chosen(types: str) -> list[str]:
    names = [name.strip() for name in types.split(",") if name.strip()]
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        raise UsageError(f"--types knows {', '.join(FILE_TYPES)}: leave out {', '.join(unknown) or 'nothing, but name one'}")
    return names


@click.command(context_settings={"show_default": True})
@click.option("--types", default=",".join(FILE_TYPES), help="Types to compare, separated by commas.")
@click.option("--layers", default=8, type=click.IntRange(1), help="Layers of the random model. 8 take 750 MB as F16, 160 MB as MBQ3.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Rounds in which all types are measured; medians are shown.")
@click.option("--prompt", default=512, type=click.IntRange(1), help="Tokens of the prompt (pp).")
@click.option("--generate", default=64, type=click.IntRange(1), help="Tokens generated (tg).")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(1), help="Threads of llama-bench.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder in which models are kept between runs. [default: a temporary one]")
@click.option("--out", type=click.Path(path_type=Path), help="Write all measurements to this JSON file.")
def main(types: str, layers: int, rounds: int, prompt: int, generate: int, threads: int, work: Path | None, out: Path | None) -> None:
    """Compare the speed of quantised types on this CPU.

    Writes a decoder with Qwen2-VL-2B's layer shapes and random weights, quantises it to each type with llama-quantize and measures it with
    llama-bench. tg generates one token after the other (each reads all weights once), pp processes a prompt in one batch. "bandwidth" is
    the share of the measured memory bandwidth that reading the weights takes in tg: near 100 %, no kernel can be faster.

    Compare ratios, not tokens per second of different days: other work on the machine slows all types alike, and a large spread shows that
    there was some.

    \b
    Example: python tools/bench_cpu.py --types Q3_K,MBQ3,MBQ3_64 --rounds 9 --work /tmp/bench --out bench.json
    """
    console = Console()
    try:
        names = _chosen(types)
        with tempfile.TemporaryDirectory() as temporary:
            folder = work or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            models = prepare_models(folder, names, layers, threads, console)
            bandwidth = memory_bandwidth(threads)
            results = measure(models, prompt, generate, rounds, threads, console)
            rows = tabulate(models, results, bandwidth)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{processor()}, {threads} threads, {bandwidth / 1e9:.1f} GB/s, pp{prompt} tg{generate}, {layers} layers, {date}"
    print_table(rows, title, console)
    if out is not None:
        facts = {"date": date, "processor": processor(), "threads": threads, "bandwidth": bandwidth, "layers": layers}
        out.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows], "results": results}, indent=1))


if __name__ == "__main__":
    main()
