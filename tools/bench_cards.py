#!/usr/bin/env python3
"""Measures how much faster a conversion is with several GPUs, and checks that the files are the same.

    python tools/random_model.py qwen2-vl-7b big --layers 3
    python tools/bench_cards.py big --cards 4,2,1 --layers 28 --json cards.json -- --samples 96

The time of a layer is measured between the first finished layer and the last, because the first one includes setup. MODEL_DIR may have
fewer decoder layers than the real model, whose number is --layers; the total is extrapolated. Arguments after `--` are passed to `convert`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

STAGE = re.compile(r"([a-z][a-z ]*?) (?:(\d+) min )?(\d+(?:\.\d)?) s")


@dataclass(frozen=True)
class Run:
    """One conversion with ``cards`` GPUs: ``seconds`` in total, for a ``layer``, and by stage; a digest of both files."""

    cards: int
    seconds: float
    layer: float
    stages: dict[str, float]
    digest: str


def run(model: Path, cards: int, options: list[str]) -> Run:
    """Convert ``model`` into a new folder. Raises SystemExit with the output if it fails."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out, work = Path(folder) / "out.gguf", Path(folder) / "work"
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(cards)] if cards > 1 else []
        command = [sys.executable, *launcher, "-m", "mbq_gguf", "convert", str(model), str(out), "--work-dir", str(work), *options]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "1000"})
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        ends = sorted(path.stat().st_mtime for path in work.glob("layer-*.safetensors"))
        layer = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        told = STAGE.findall(done.stdout.strip().splitlines()[-1])
        stages = {name: 60 * float(minutes or 0) + float(rest) for name, minutes, rest in told}
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in (out, out.with_name(f"mmproj-{out.name}")))).hexdigest()
        return Run(cards, seconds, layer, stages, digest)


def shown(runs: list[Run], more: int) -> Table:
    """A table of the runs compared with the one with the fewest GPUs; ``more`` layers are added to each."""
    fewest = min(runs, key=lambda each: each.cards)
    table = Table("cards", "seconds", "a layer", "times", "reckoned", "times", "same bytes")
    for each in runs:
        whole, beside = each.seconds + more * each.layer, fewest.seconds + more * fewest.layer
        ratio = fewest.layer / each.layer if each.layer else 1.0
        figures = f"{each.seconds:.1f}", f"{each.layer:.2f}", f"{ratio:.2f}", f"{whole:.0f}", f"{beside / whole:.2f}"
        table.add_row(str(each.cards), *figures, "yes" if each.digest == fewest.digest else "NO")
    return table


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cards", default="4,2,1", show_default=True, help="Numbers of GPUs, one run each.")
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers of the real model (default: MODEL's own).")
@click.option("--device", default="cuda", show_default=True, help="cuda, or cpu to try it out.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this JSON file after each run."
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(model: Path, cards: str, layers: int | None, device: str, json_file: Path | None, options: tuple[str, ...]) -> None:
    """Convert MODEL with each number of GPUs."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    had: int = config.get("text_config", config)["num_hidden_layers"]
    more = (layers or had) - had
    runs: list[Run] = []
    for count in map(int, cards.split(",")):
        runs.append(run(model.absolute(), count, ["--device", device, *options]))
        click.echo(f"{count}: {runs[-1].seconds:.1f} s, {runs[-1].layer:.2f} s a layer, {runs[-1].stages}", err=True)
        if json_file:
            figures = [asdict(each) | {"reckoned": each.seconds + more * each.layer} for each in runs]
            json_file.write_text(json.dumps({"layers": had + more, "measured": had, "runs": figures}, indent=1) + "\n", encoding="utf-8")
    Console().print(shown(runs, more))


if __name__ == "__main__":
    main()
