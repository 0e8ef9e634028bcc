"""Measures what quantising activations costs in whole prompts: W4A8 with dynamic scales, with static ones, and with quantising skipped.

When it is skipped, products run on whatever is in memory: the answers are wrong, but no quantiser can be faster. Modes alternate, and
ratios are taken within one round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import paths
from random_gguf import LanguageShape, write_random_gguf
from relinked import relink
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
HERE = Path(__file__).parent
MODES = ("dynamic", "static", "skipped")
SITES = ("qkv", "o", "gate_up", "down")


def static_keys(layers: int) -> Json:
    """Metadata with static ranges for a whole random model, as in a converted file; the values do not matter for speed."""
    return {"mbq.act.version": 1, "mbq.act.sink.positions": [0]} | {f"mbq.act.range.{site}.text": layers * [4.0] for site in SITES}


def prompts(
    bench: Path, models: Mapping[str, Path], environments: Mapping[str, Mapping[str, str]], options: Sequence[str], rounds: int, warm: int
) -> list[Json]:
    """Tokens per second of llama-bench by mode and prompt length. ``environments`` are environment variables by mode, ``options`` are for
    llama-bench.

    The first ``warm`` repetitions of each run are dropped. Values are medians over ``rounds``; ratios are to dynamic in the same round.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for mode in MODES[number % 3 :] + MODES[: number % 3]:
            for test in json.loads(run([bench, "-m", models[mode], "-n", "0", *options, "-o", "json"], environments[mode])):
                found.setdefault((mode, test["n_prompt"]), []).append(statistics.mean(test["samples_ts"][warm:]))
    rows = []
    for (mode, length), speeds in sorted(found.items(), key=lambda item: (item[0][1], MODES.index(item[0][0]))):
        ratios = [speed / dynamic for speed, dynamic in zip(speeds, found["dynamic", length], strict=True)]
        spread = (max(speeds) - min(speeds)) / statistics.median(speeds)
        row = {"activations": mode, "test": f"pp{length}", "tokens_s": round(statistics.median(speeds), 1), "spread": round(spread, 4)}
        rows.append(row | {"ratio": round(statistics.median(ratios), 4), "ratios": [round(ratio, 4) for ratio in ratios]})
    return rows


def run(command: Sequence[str | Path], environment: Mapping[str, str], *, text: str | None = None, errors: bool = False) -> str:
    """The output of a program with ``text`` on stdin, or its stderr. Raises UserError with the last line if it fails."""
    done = subprocess.run([str(part) for part in command], env=environment, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{Path(command[0]).name} failed ({done.stderr.strip()[-400:]}): run it by hand to see more")
    return done.stderr if errors else done.stdout


def print_prompts(console: Console, rows: Sequence[Json], title: str) -> None:
    """One line for each mode and length, with and without fusion if measured."""
    table = Table("prompt", "activations", "fusion", "tokens/s", "spread", "of dynamic (lowest to highest)", "launches", title=title)
    for row in rows:
        ratio = f"{row['ratio']:.4f} ({min(row['ratios']):.4f} to {max(row['ratios']):.4f})"
        cells = [row["test"], row["activations"], row.get("fusion", ""), f"{row['tokens_s']:.1f}", f"{row['spread']:.2%}", ratio]
        table.add_row(*cells, str(row.get("launches", "")))
    console.print(table)


def on_cpu(work: Path, shape: LanguageShape, prompt: int, threads: int, rounds: int) -> list[Json]:
    """Measure prompts on this CPU: a random model of ``shape``, also with a library relinked to skip quantising (skipped/row-scale.cpp)."""
    bench = paths.find_program("llama-bench")
    models = {"dynamic": work / "dynamic.gguf", "static": work / "static.gguf", "skipped": work / "dynamic.gguf"}
    write_random_gguf(models["dynamic"], shape, "W4A8")
    write_random_gguf(models["static"], shape, "W4A8", metadata=static_keys(shape.layers))
    skipped = relink(bench.parents[1], "ggml-cpu", work / "skipped", HERE / "skipped" / "row-scale.cpp")
    environments = {"dynamic": dict(os.environ), "static": dict(os.environ), "skipped": skipped}
    return prompts(bench, models, environments, ["-ngl", "0", "-t", str(threads), "-p", str(prompt), "-r", "1"], rounds, warm=0)
