#!/usr/bin/env python3
"""Kills a conversion of the tests' tiny VLM at random moments and continues it; the files must equal those of an undisturbed run.

    python tools/soak_kills.py                100 kills; exit code 1 if one byte differs or anything is left behind
    python tools/soak_kills.py --kills 10 --seed 3

Two of three kills are SIGKILL, one is SIGTERM. The moments are spread over the time of the undisturbed run. A run that ends before its
moment, or was killed five times, is allowed to end, compared, and started again from nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from io import StringIO
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("out.gguf", "mmproj-out.gguf")
OPTIONS = {"type": "MBQ3S", "samples": 2, "synthetic": 0}
IN_A_ROW = 5  # kills of one conversion before it is allowed to end
KILLS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def start(model: Path, out: Path) -> int:
    """Run the conversion in a child process, forked so that a kill does not cost another import; returns its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            _convert(model, out)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(status)
    return pid


def _convert(model: Path, out: Path) -> None:
    import torch
    from mbq_gguf.convert import ConvertOptions, convert
    from mbq_gguf.llama_cpp.locks import termination_as_exit
    from rich.console import Console

    torch.set_num_threads(1)
    with termination_as_exit():
        convert(ConvertOptions(model, out, **OPTIONS), Console(file=StringIO()))  # type: ignore[arg-type]


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of the child once it has ended, None if it still runs after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def content(folder: Path) -> list[bytes]:
    """The contents of both files, which must be the only ones there."""
    names = sorted(path.name for path in folder.iterdir())
    if names != sorted(NAMES):
        raise click.ClickException(f"{folder} holds {', '.join(names)}: the conversion left something behind, or wrote too little")
    return [(folder / name).read_bytes() for name in NAMES]


def soak(model: Path, folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Kill ``kills`` times; returns what happened, by name. Raises ClickException for the first deviation."""
    calm, out = folder / "calm", folder / "killed"
    for path in (calm, out):
        path.mkdir()
    began = time.monotonic()
    if code := ended(start(model, calm / NAMES[0]), 3600):
        raise click.ClickException(f"the undisturbed conversion ended with exit code {code}: run `mbq-gguf convert` to see why")
    whole, length = content(calm), time.monotonic() - began
    happened: Counter[str] = Counter()
    in_a_row = 0
    while happened["kills"] < kills:
        pid, sign = start(model, out / NAMES[0]), draw.choice(KILLS)
        code = ended(pid, draw.uniform(0, length) if in_a_row < IN_A_ROW else 3600)
        in_a_row = in_a_row + 1 if code is None else 0
        if code is None:
            os.kill(pid, sign)
            code = ended(pid, 3600)
            happened["kills"] += 1
            happened[sign.name] += 1
            for name, expected in zip(NAMES, whole, strict=True):
                if (out / name).exists() and (out / name).read_bytes() != expected:
                    raise click.ClickException(f"after kill {happened['kills']} {name} is there and not whole: a file lies")
            happened["kills with work kept"] += any(out.glob("*.work/*/layer-*"))
            if happened["kills"] % 10 == 0:
                click.echo(f"{happened['kills']} kills, {happened['runs that ended']} runs that ended")
        if code == 0:
            compare(content(out), whole)
            happened["runs that ended"] += 1
            shutil.rmtree(out)
            out.mkdir()
        elif code not in (-sign, 128 + sign):
            raise click.ClickException(f"a conversion ended with exit code {code} instead of by {sign.name}: a run did not go on")
    if code := ended(start(model, out / NAMES[0]), 3600):
        raise click.ClickException(f"the last conversion ended with exit code {code}: what the kills left keeps it from going on")
    compare(content(out), whole)
    happened["runs that ended"] += 1
    return happened


def compare(found: list[bytes], whole: list[bytes]) -> None:
    """Raise ClickException if a byte differs."""
    for name, one, other in zip(NAMES, found, whole, strict=True):
        if one != other:
            raise click.ClickException(f"{name} is not that of the undisturbed run: {len(one)} and {len(other)} bytes")


@click.command()
@click.option("--kills", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="Seed of the moments.")
def main(kills: int, seed: int) -> None:
    """Kill a conversion repeatedly."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_vlm import write_tiny_vlm

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        writer = os.fork()  # torch's threads stay in a process that is never forked
        if writer == 0:
            write_tiny_vlm(Path(folder) / "model")
            os._exit(0)
        ended(writer, 600)
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer  # noqa: F401

        began = time.monotonic()
        happened = soak(Path(folder) / "model", Path(folder), kills, random.Random(seed))
        told = ", ".join(f"{count} {name}" for name, count in happened.items())
        click.echo(f"{told}; every file the same bytes; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
