"""How fast the MBQ types are on this GPU beside llama.cpp's own, in one run: single products (cold and warm in L2) and whole models.

    MBQ_GGUF_BACKEND=cuda python tools/bench_gpu.py

Products are timed by bench_mul_mat.cu (built here, with nvcc), whole models by llama-bench on random weights (random_gguf.py).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from mbq_gguf.errors import UserError
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.llama_cpp import paths
from random_gguf import QWEN2_VL_7B, write_random_gguf
from rich.console import Console
from rich.table import Table

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "MBQ3", "MBQ3_64", "MBQ3S", "MBQ3S_64")
# Rows and columns: the yardstick of the other figures, then the feed-forward and attention matrices of Qwen2-VL-2B, 7B and 72B
SHAPES = ((4096, 14336), (8960, 1536), (1536, 8960), (3584, 3584), (18944, 3584), (3584, 18944), (8192, 8192), (29568, 8192), (8192, 29568))
COLUMNS = (1, 2, 4, 8, 512)
MIXTURES = ("Q4_K_M", "Q3_K_M", "MBQ3", "MBQ3S")
Json = dict[str, Any]


def run(command: Sequence[str | Path], text: str | None = None) -> str:
    """Output of a command. Raises UserError with its last words where it fails."""
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{Path(command[0]).name} failed ({done.stderr.strip()[-400:]}): run it by hand to see more")
    return done.stdout


def block_size(name: str) -> tuple[int, int]:
    """Weights and bytes of a block of a type."""
    gguf = import_gguf()
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(weights), int(size)


def time_products(folder: Path, work: Path, types: Sequence[str]) -> tuple[float, list[Json]]:
    """Read bandwidth in TB/s, and for each product the time in microseconds."""
    program = work / "bench_mul_mat"
    source = Path(__file__).with_name("bench_mul_mat.cu")
    libraries = [f"-l{name}" for name in ("ggml", "ggml-base", "ggml-cuda")]
    rpath = ["-Xlinker", f"-rpath={folder}"]
    include = paths.source_dir() / "ggml" / "include"
    run(["nvcc", "-std=c++17", "-O2", "-arch=native", f"-I{include}", source, f"-L{folder}", *libraries, *rpath, "-o", program])
    fitting = [(name, m, k) for m, k in SHAPES for name in types if k % block_size(name)[0] == 0]  # 29568 is no multiple of 256
    lines = [f"{name} {m} {k} {' '.join(map(str, COLUMNS))}" for name, m, k in fitting]
    read, *rest = run([program], "\n".join(lines)).splitlines()
    products = []
    for line in rest:
        name, m, k, n, cold, us = line.split()
        products.append({"type": name, "m": int(m), "k": int(k), "n": int(n), "cold": cold == "1", "us": float(us)})
    return float(read.split()[1]), products


def time_models(folder: Path, work: Path) -> list[Json]:
    """Tokens a second of a prompt of 512 tokens and of 128 generated ones for each mixture."""
    results = []
    for mixture in MIXTURES:
        model = work / f"{mixture}.gguf"
        write_random_gguf(model, QWEN2_VL_7B, mixture)
        size = model.stat().st_size
        answer = json.loads(run([folder / "llama-bench", "-m", model, "-ngl", "99", "-p", "512", "-n", "128", "-r", "5", "-o", "json"]))
        model.unlink()
        for test in answer:
            name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
            speed, deviation = round(test["avg_ts"], 1), round(test["stddev_ts"], 1)
            results.append({"model": "Qwen2-VL-7B", "type": mixture, "bytes": size, "test": name, "tokens_s": speed, "stddev": deviation})
    return results


def print_products(console: Console, read: float, products: list[Json]) -> None:
    """One table a shape: microseconds for each n, bandwidth and its share with one column, and the time beside MBQ3's."""
    for m, k in SHAPES:
        table = Table("type", *(f"n={n}, {'cold' if cold else 'warm'}" for n in COLUMNS[:-1] for cold in (True, False)), f"n={COLUMNS[-1]}",
                      "TB/s, n=1 cold", "of read", "of MBQ3, n=1 cold", title=f"{m} x {k}, microseconds")  # fmt: skip
        times = {(p["type"], p["n"], p["cold"]): p["us"] for p in products if (p["m"], p["k"]) == (m, k)}
        for name in dict.fromkeys(key[0] for key in times):
            cells = [f"{times[name, n, cold]:.1f}" for n in COLUMNS[:-1] for cold in (True, False)]
            us = times[name, 1, True]
            weights, size = block_size(name)
            speed = m * k / weights * size / us * 1e-6
            ratio = f"{us / times['MBQ3', 1, True]:.2f}" if ("MBQ3", 1, True) in times else ""
            table.add_row(name, *cells, f"{times[name, COLUMNS[-1], False]:.0f}", f"{speed:.2f}", f"{100 * speed / read:.0f} %", ratio)
        console.print(table)


def print_models(console: Console, models: list[Json]) -> None:
    """Tokens a second of whole models."""
    table = Table("type", "GiB", "test", "tokens/s", "deviation", title="Qwen2-VL-7B, random weights")
    for row in models:
        table.add_row(row["type"], f"{row['bytes'] / 2**30:.2f}", row["test"], f"{row['tokens_s']:.1f}", f"{row['stddev']:.1f}")
    console.print(table)


@click.command()
@click.option("--bin", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of the built programs.")
@click.option("--types", default=",".join(TYPES), show_default=True, help="Types of the single products.")
@click.option("--models/--no-models", default=True, show_default=True, help="Whole models too.")
@click.option(
    "--work", type=click.Path(file_okay=False, path_type=Path), help="Where the random models go (5 GB); else a temporary folder."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("docs/results/gpu.json"), show_default=True)
def main(folder: Path | None, types: str, models: bool, work: Path | None, output: Path) -> None:
    """Time products and models, print the tables and store the figures."""
    console = Console(width=200)
    folder = folder or paths.find_program("llama-bench").parent
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        read, products = time_products(folder, Path(temporary), types.split(","))
        print_products(console, read, products)
        results = time_models(folder, Path(temporary)) if models else []
        print_models(console, results)
    device = run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()[0]
    record = {"device": device, "date": datetime.now(UTC).date().isoformat(), "command": shlex.join(["python", *sys.argv]),
              "read_tb_s": read, "mul_mat": products, "end_to_end": results}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
