"""Measures the MBQ types, or W4A8 and W8A8, beside llama.cpp's own types on this GPU: single products and whole models.

    MBQ_GGUF_BACKEND=cuda python tools/bench_gpu.py
    MBQ_GGUF_BACKEND=cuda python tools/bench_gpu.py --row-scale

Products are measured by bench_mul_mat.cu (cold and warm in L2), and as a reference cuBLASLt's by bench_cublas.cu; both are built here with
nvcc. Whole models are measured by llama-bench with random weights (random_gguf.py) and flash attention. Each result is stored at once.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from mbq_gguf.errors import UserError
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.row_scale import stored_as
from mbq_gguf.llama_cpp import paths
from random_gguf import QWEN2_VL_7B, write_random_gguf
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """What to measure: products by type, shape (rows and columns of a weight) and number of columns; cuBLASLt's types; whole models."""

    types: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]
    anchors: tuple[str, ...]
    mixtures: tuple[str, ...]
    prompts: str  # lengths
    repetitions: tuple[int, int]  # of prompts and of generated tokens; the first half of them warms the clocks
    store: str


# The reference shape of other figures, then the feed-forward and attention matrices of Qwen2-VL-2B, 7B and 72B
MBQ = Plan(
    types=("F16", "Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "MBQ3", "MBQ3_64", "MBQ3S", "MBQ3S_64"),
    shapes=(
        (4096, 14336),
        (8960, 1536),
        (1536, 8960),
        (3584, 3584),
        (18944, 3584),
        (3584, 18944),
        (8192, 8192),
        (29568, 8192),
        (8192, 29568),
    ),
    columns=(1, 2, 4, 8, 512),
    anchors=(),
    mixtures=("Q4_K_M", "Q3_K_M", "MBQ3", "MBQ3S"),
    prompts="512",
    repetitions=(60, 6),
    store="gpu.json",
)
# The reference shape, and all matrices of Qwen2-VL-7B
ROW_SCALE = Plan(
    types=("F16", "Q4_0", "MBQ3", "W4A8", "W8A8"),
    shapes=((4096, 14336), (18944, 3584), (3584, 18944), (3584, 3584), (512, 3584)),
    columns=(1, 8, 512, 4096),
    anchors=("F16", "I8", "F8"),
    mixtures=("F16", "Q4_0", "Q4_K_M", "MBQ3", "W4A8"),
    prompts="512,2048",
    repetitions=(60, 6),
    store="gpu_row_scale.json",
)


def run(command: Sequence[str | Path], text: str | None = None) -> str:
    """The output of a command. Raises UserError with the last line if it fails."""
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{Path(command[0]).name} failed ({done.stderr.strip()[-400:]}): run it by hand to see more")
    return done.stdout


def lines_of(program: Path, text: str) -> Iterator[list[str]]:
    """Yields each line of a program's output, split into words. Raises UserError if it fails."""
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(text)
        process.stdin.close()
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line.split()
    if process.returncode != 0:
        raise UserError(f"{program.name} failed: see what it said above")


def block_size(name: str) -> tuple[int, int]:
    """Weights and bytes per block of a type."""
    gguf = import_gguf()
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored_as(name)]]
    return int(weights), int(size)


def compile_program(name: str, work: Path, *options: str | Path) -> Path:
    """Compile a program of this folder."""
    run(["nvcc", "-std=c++17", "-O2", "-arch=native", HERE / f"{name}.cu", *options, "-o", work / name])
    return work / name


def compile_products(folder: Path, work: Path) -> Path:
    """Compile the program that measures ggml's products."""
    libraries = [f"-l{name}" for name in ("ggml", "ggml-base", "ggml-cuda")]
    include = paths.source_dir() / "ggml" / "include"
    runpath = ["-Xlinker", "--enable-new-dtags", "-Xlinker", f"-rpath={folder}"]  # LD_LIBRARY_PATH goes first
    return compile_program("bench_mul_mat", work, f"-I{include}", f"-L{folder}", *libraries, *runpath)


def time_products(folder: Path, work: Path, plan: Plan) -> tuple[float, list[Json]]:
    """The read bandwidth in TB/s, and for each product the time in microseconds."""
    program = compile_products(folder, work)
    fitting = [(name, m, k) for m, k in plan.shapes for name in plan.types if k % block_size(name)[0] == 0]  # not 29568 and 256
    (_, read), *rest = lines_of(program, "\n".join(f"{name} {m} {k} {' '.join(map(str, plan.columns))}" for name, m, k in fitting))
    products = []
    for name, m, k, n, cold, us in rest:
        products.append({"type": name, "m": int(m), "k": int(k), "n": int(n), "cold": cold == "1", "us": float(us)})
    return float(read), products


def time_anchors(work: Path, plan: Plan) -> list[Json]:
    """cuBLASLt's products of many columns, without quantising: microseconds, and 10^12 operations per second."""
    if not plan.anchors:
        return []
    try:
        program = compile_program("bench_cublas", work, "-lcublasLt")
    except UserError as error:
        print(f"without cuBLASLt's products: {error}", flush=True)
        return []
    many = " ".join(str(n) for n in plan.columns if n > 8)
    anchors = []
    for name, m, k, n, us in lines_of(program, "\n".join(f"{name} {m} {k} {many}" for m, k in plan.shapes for name in plan.anchors)):
        speed = round(2e-6 * int(m) * int(k) * int(n) / float(us), 1)
        anchors.append({"type": name, "m": int(m), "k": int(k), "n": int(n), "us": float(us), "tops": speed})
    return anchors


def time_model(folder: Path, work: Path, mixture: str, plan: Plan) -> list[Json]:
    """Tokens per second for prompts and for generated tokens of a mixture, and their spread, over the later half of the repetitions."""
    model = work / f"{mixture}.gguf"
    write_random_gguf(model, QWEN2_VL_7B, mixture)
    size = model.stat().st_size
    answer = []
    for tests, repetitions in zip((("-p", plan.prompts, "-n", "0"), ("-p", "0", "-n", "128")), plan.repetitions, strict=True):
        options = ["-ngl", "99", "-fa", "1", *tests, "-r", str(repetitions), "-o", "json"]
        answer += json.loads(run([folder / "llama-bench", "-m", model, *options]))
    model.unlink()
    results = []
    for test in answer:
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        warm = test["samples_ts"][len(test["samples_ts"]) // 2 :]
        speed, deviation = round(statistics.mean(warm), 1), round(statistics.stdev(warm), 1)
        results.append({"model": "Qwen2-VL-7B", "type": mixture, "bytes": size, "test": name, "tokens_s": speed, "stddev": deviation})
        print(mixture, name, speed, "+-", deviation, flush=True)
    return results


def print_products(console: Console, read: float, products: list[Json], anchors: list[Json], plan: Plan) -> None:
    """One table for each shape: microseconds for each n, bandwidth and its share with one column, and the time relative to MBQ3's."""
    few, many = [n for n in plan.columns if n <= 8], [n for n in plan.columns if n > 8]
    for m, k in plan.shapes:
        table = Table("type", *(f"n={n}, {'cold' if cold else 'warm'}" for n in few for cold in (True, False)), *(f"n={n}" for n in many),
                      "TB/s, n=1 cold", "of read", "of MBQ3, n=1 cold", title=f"{m} x {k}, microseconds")  # fmt: skip
        times = {(p["type"], p["n"], p["cold"]): p["us"] for p in products if (p["m"], p["k"]) == (m, k)}
        for name in dict.fromkeys(key[0] for key in times):
            cells = [f"{times[name, n, cold]:.1f}" for n in few for cold in (True, False)]
            us = times[name, 1, True]
            weights, size = block_size(name)
            speed = m * k / weights * size / us * 1e-6
            ratio = f"{us / times['MBQ3', 1, True]:.2f}" if ("MBQ3", 1, True) in times else ""
            table.add_row(
                name, *cells, *(f"{times[name, n, False]:.0f}" for n in many), f"{speed:.2f}", f"{100 * speed / read:.0f} %", ratio
            )
        for name in plan.anchors:
            best = {p["n"]: f"{p['us']:.0f}" for p in anchors if (p["type"], p["m"], p["k"]) == (name, m, k)}
            table.add_row(f"cuBLASLt {name}", *("" for _ in range(2 * len(few))), *(best.get(n, "") for n in many))
        console.print(table)


def print_models(console: Console, models: list[Json]) -> None:
    """Print the tokens per second of whole models."""
    table = Table("type", "GiB", "test", "tokens/s", "deviation", title="Qwen2-VL-7B, random weights")
    for row in models:
        table.add_row(row["type"], f"{row['bytes'] / 2**30:.2f}", row["test"], f"{row['tokens_s']:.1f}", f"{row['stddev']:.1f}")
    console.print(table)


@click.command()
@click.option("--bin", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of the built programs.")
@click.option(
    "--row-scale", is_flag=True, help="Measure W4A8 and W8A8, and cuBLASLt's products for comparison: about 5 minutes on an H100."
)
@click.option("--types", help="Types of the single products, instead of the default ones.")
@click.option("--models/--no-models", default=True, show_default=True, help="Also measure whole models.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the random models (5 GB, F16 16 GB). [default: a temporary one]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file. [default: docs/results/gpu.json, with --row-scale gpu_row_scale.json]",
)
def main(folder: Path | None, row_scale: bool, types: str | None, models: bool, work: Path | None, output: Path | None) -> None:
    """Measure products and models, print the tables and store the figures."""
    console = Console(width=200)
    plan = ROW_SCALE if row_scale else MBQ
    plan = replace(plan, types=tuple(types.split(","))) if types else plan
    output = output or Path("docs/results") / plan.store
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = folder or paths.find_program("llama-bench").parent
    device = run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()[0]
    record: Json = {"device": device, "date": datetime.now(UTC).date().isoformat(), "command": shlex.join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        record["read_tb_s"], record["mul_mat"] = time_products(folder, Path(temporary), plan)
        record |= {"anchors": time_anchors(Path(temporary), plan), "end_to_end": []}
        print_products(console, record["read_tb_s"], record["mul_mat"], record["anchors"], plan)
        output.write_text(json.dumps(record, indent=1) + "\n")
        for mixture in plan.mixtures if models else ():
            record["end_to_end"] += time_model(folder, Path(temporary), mixture, plan)
            output.write_text(json.dumps(record, indent=1) + "\n")
        print_models(console, record["end_to_end"])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
