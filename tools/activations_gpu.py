"""bench_activations.py --gpu: W4A8's products and prompts with dynamic, static or skipped quantisation, with and without fusion.

The build without quantising (skipped/mbq-w4a8.cu) and the library that counts launches (relinked.py) take about two minutes to compile.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from activations import MODES, Json, print_prompts, prompts, run, static_keys
from bench_gpu import compile_products
from mbq_gguf.errors import UserError
from random_gguf import QWEN2_VL_7B, write_random_gguf
from relinked import counting, relink
from rich.console import Console
from rich.table import Table

SKIPPED = Path(__file__).parent / "skipped" / "mbq-w4a8.cu"
SHAPES = ((3584, 3584), (18944, 3584), (3584, 18944))  # of Qwen2-VL-7B: q and o, gate and up, down
COLUMNS = (512, 2048)
ROUNDS = 3
REPETITIONS, WARM = 30, 10
FUSION = {"with": {}, "without": {"GGML_CUDA_DISABLE_FUSION": "1"}}


def on_gpu(folder: Path, work: Path, record: Json, output: Path, console: Console) -> None:
    """Run all measurements with the programs in ``folder``; ``record`` is written to ``output`` after each part."""

    def store() -> None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    console.print("compiling without the pass of quantising, and what counts launches: two minutes")
    program = compile_products(folder, work)
    plain, skipped = dict(os.environ), relink(folder.parent, "ggml-cuda", work / "skipped", SKIPPED)
    environments = {"dynamic": plain, "static": plain, "skipped": skipped}
    record["linears"] = [row for mode in MODES for row in linears(program, mode, environments[mode])]
    print_linears(console, record["linears"])
    store()
    models = {"dynamic": work / "dynamic.gguf", "static": work / "static.gguf", "skipped": work / "dynamic.gguf"}
    write_random_gguf(models["dynamic"], QWEN2_VL_7B, "W4A8")
    write_random_gguf(models["static"], QWEN2_VL_7B, "W4A8", metadata=static_keys(QWEN2_VL_7B.layers))
    bench, options = folder / "llama-bench", ["-ngl", "99", "-fa", "1"]
    record["prompts"] = []
    for fusion, more in FUSION.items():
        of = {mode: {**environment, **more} for mode, environment in environments.items()}
        tests = [*options, "-p", "512,2048", "-r", str(REPETITIONS)]
        record["prompts"] += [{**row, "fusion": fusion} for row in prompts(bench, models, of, tests, ROUNDS, WARM)]
        print_prompts(console, record["prompts"], "Qwen2-VL-7B, W4A8, random weights")
        store()
    counted = counting(folder.parent, work / "counted")
    counters = {"dynamic": counted, "static": counted, "skipped": counting(folder.parent, work / "counted-skipped", SKIPPED)}
    for row in (row for row in record["prompts"] if row["test"] == "pp512"):  # longer ones are batches of 512
        mode = row["activations"]
        command = [bench, "-m", models[mode], *options, "-n", "0", "-p", row["test"][2:]]
        row["launches"] = launches(command, {**counters[mode], **FUSION[row["fusion"]]})
    print_prompts(console, record["prompts"], "Qwen2-VL-7B, W4A8, random weights")
    store()


def linears(program: Path, mode: str, environment: Mapping[str, str]) -> list[Json]:
    """Microseconds for single products, each of which quantises its activations."""
    lines = "\n".join(f"W4A8 {m} {k} {' '.join(map(str, COLUMNS))}" for m, k in SHAPES)
    said = run([program, *(["static"] if mode == "static" else [])], environment, text=lines)
    found = [line.split() for line in said.splitlines() if not line.startswith("read")]
    return [{"activations": mode, "m": int(m), "k": int(k), "n": int(n), "us": float(us)} for _, m, k, n, _, us in found]


def launches(command: list[str | Path], environment: Mapping[str, str]) -> int:
    """The number of ggml kernels that one prompt launches: the difference that a second repetition makes, without CUDA graphs."""
    counts = []
    for repetitions in (1, 2):
        more = ["--no-warmup", "-r", str(repetitions), "-o", "json"]
        found = re.search(
            r"^launches (\d+)$", run([*command, *more], {**environment, "GGML_CUDA_DISABLE_GRAPHS": "1"}, errors=True), re.MULTILINE
        )
        if found is None:
            raise UserError("the library that counts launches was not used: look for another libggml-cuda in LD_LIBRARY_PATH")
        counts.append(int(found[1]))
    return counts[1] - counts[0]


def print_linears(console: Console, rows: list[Json]) -> None:
    """One line for each product."""
    table = Table("rows x columns", "n", *MODES, "static saves", "the pass", title="W4A8, microseconds a product, unfused")
    for m, k, n in dict.fromkeys((row["m"], row["k"], row["n"]) for row in rows):
        us = {row["activations"]: row["us"] for row in rows if (row["m"], row["k"], row["n"]) == (m, k, n)}
        saved, whole = us["dynamic"] - us["static"], us["dynamic"] - us["skipped"]
        table.add_row(f"{m} x {k}", str(n), *(f"{us[mode]:.1f}" for mode in MODES), f"{saved:.1f}", f"{whole:.1f}")
    console.print(table)
