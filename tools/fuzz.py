#!/usr/bin/env python3
"""Feeds corrupted files to the project's readers and to the patched libllama and libmtmd, and keeps inputs that break them.

    python tools/fuzz.py header --count 100000           the header reader; the kinds are in tests/fuzz/targets/table.py
    python tools/fuzz.py text mmproj --count 10000       loads, each in a child process that may crash
    python tools/fuzz.py header jsonl --count 400000 --jobs 16 --minutes 5
    python tools/fuzz.py text --seed 3 --show 4711       one input again: kept in a folder, and read
    python tools/fuzz.py mmproj --read FOLDER            read the input in such a folder again

A run continues where the last one of its kind and seed stopped. Faults are kept under --out, at most three files for each signature. Those
listed in tests/fuzz/upstream.py are counted but do not fail; others give exit code 1. With --jobs, that many processes share the count,
with seeds that follow --seed, and the totals are printed at the end.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

import click  # noqa: E402
import harness  # noqa: E402
import upstream  # noqa: E402
from mbq_gguf.errors import USER_ERRORS, UserError  # noqa: E402
from mbq_gguf.llama_cpp.cache import cache_root  # noqa: E402
from targets import Target  # noqa: E402
from targets.table import TARGETS  # noqa: E402

KEPT = 3  # files per signature
SAVE_SECONDS = 10.0
SAY_SECONDS = 60.0


@dataclass
class State:
    """The progress of a run of one kind and seed."""

    done: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)  # numbers of inputs by signature
    counts: Counter[str] = field(default_factory=Counter)  # faults by signature

    def unknown(self, known: list[str]) -> list[str]:
        """Signatures of unknown faults."""
        return [signature for signature in self.counts if not any(re.search(part, signature) for part in known)]


def load(kind: str, seed: int, out: Path) -> State:
    """The progress of the run of ``kind`` and ``seed``."""
    file = state_file(kind, seed, out)
    if not file.is_file():
        return State()
    kept = json.loads(file.read_text())
    return State(kept["done"], kept["seconds"], Counter(kept["outcomes"]), kept["faults"], Counter(kept["counts"]))


def state_file(kind: str, seed: int, out: Path) -> Path:
    """The file for a run's progress."""
    return out / f"{kind}-{seed}.json"


def known_faults() -> list[str]:
    """Regular expressions for the signatures of known upstream faults."""
    return [part for fault in upstream.FAULTS for part in fault.signatures]


def fuzz(kind: str, count: int, seed: int, minutes: float, out: Path) -> State:
    """Run ``kind`` up to input ``count``, or for ``minutes``, and keep state and faults in ``out``."""
    file, state = state_file(kind, seed, out), load(kind, seed, out)
    target, known, end = TARGETS[kind](), known_faults(), time.monotonic() + 60 * minutes
    began, saved, said = time.monotonic() - state.seconds, time.monotonic(), time.monotonic()
    try:
        for outcome in harness.run(target, kind, seed, state.done, count):
            state.done += 1
            state.outcomes[outcome.what] += 1
            now = time.monotonic()
            state.seconds = now - began
            if outcome.what == "fault":
                state.counts[outcome.signature] += 1
                numbers = state.faults.setdefault(outcome.signature, [])
                if len(numbers) < KEPT:
                    numbers.append(outcome.index)
                    keep(kind, seed, outcome, out)
            if now > end:
                break
            if now - saved > SAVE_SECONDS:
                saved = now
                save(state, file)
            if now - said > SAY_SECONDS:
                said = now
                say(kind, state, known)
    finally:
        save(state, file)
    tell(kind, state)
    return state


def tell(kind: str, state: State) -> None:
    """Print the progress and the unknown faults."""
    known = known_faults()
    say(kind, state, known)
    for signature in state.unknown(known):
        click.echo(f"  {state.counts[signature]} x {signature}: inputs {state.faults.get(signature, 'in the folder of faults')}")


def spread(kinds: tuple[str, ...], count: int, seed: int, minutes: float, jobs: int, out: Path) -> list[State]:
    """Share ``count`` inputs of each kind among ``jobs`` processes, one seed each, and add up what they find."""
    children = []
    for job in range(jobs):
        share = count // jobs + (job < count % jobs)
        command = [sys.executable, __file__, *kinds, "--count", share, "--seed", seed + job, "--minutes", minutes, "--out", out]
        if share:
            children.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL))
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.terminate()
    sums = [added([load(kind, seed + job, out) for job in range(len(children))]) for kind in kinds]
    for kind, state in zip(kinds, sums, strict=True):
        tell(kind, state)
    if any(code not in (0, 1) for code in codes):
        raise UserError(f"processes ended with exit codes {sorted(set(codes))}: run it again with --jobs 1 to see why")
    return sums


def added(states: list[State]) -> State:
    """The sum of the states of several seeds, without the numbers of inputs, which mean nothing without their seed."""
    whole = State()
    for state in states:
        whole.done += state.done
        whole.seconds = max(whole.seconds, state.seconds)
        whole.outcomes += state.outcomes
        whole.counts += state.counts
    return whole


def save(state: State, file: Path) -> None:
    """Write ``state`` atomically."""
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(vars(state), indent=1))
    draft.replace(file)


def say(kind: str, state: State, known: list[str]) -> None:
    """One line about the progress."""
    new = sum(state.counts[signature] for signature in state.unknown(known))
    faults = f"{state.outcomes['fault'] - new} faults of upstream's, {new} others"
    rate = state.done / max(state.seconds, 1e-9)
    click.echo(
        f"{kind}: {state.done} inputs, {state.outcomes['taken']} taken, {state.outcomes['refused']} refused, {faults}; {rate:.0f} a second"
    )


def keep(kind: str, seed: int, outcome: harness.Outcome, out: Path) -> None:
    """Write the input again, with the messages, to a folder of its own."""
    folder = out / "faults" / f"{kind}-{seed}-{outcome.index}"
    folder.mkdir(parents=True, exist_ok=True)
    done = TARGETS[kind]().make(harness.draw_for(kind, seed, outcome.index), harness.clean(folder))
    (folder / "fault.txt").write_text(f"{outcome.signature}\n{done}\n\n{outcome.text[-20000:]}")


def one(kind: str, seed: int, index: int, out: Path, folder: Path | None) -> int:
    """Print the outcome of one input, generated here or read from ``folder``; returns the exit code."""
    target = Lying(TARGETS[kind](), folder) if folder else TARGETS[kind]()
    (outcome,) = harness.run(target, kind, seed, index, index + 1)
    if not folder:
        keep(kind, seed, outcome, out)
    click.echo(f"{outcome.what} {outcome.signature}\n{outcome.text}".strip())
    return 1 if outcome.what == "fault" else 0


@dataclass
class Lying:
    """A target whose input already exists."""

    target: Target
    folder: Path

    def make(self, draw: random.Random, folder: Path) -> str:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, symlinks=True)
        return "as it lies there"

    def open(self) -> None:
        self.target.open()

    def read(self, folder: Path) -> str:
        return self.target.read(folder)


@click.command()
@click.argument("kinds", nargs=-1, required=True, type=click.Choice(list(TARGETS)))
@click.option(
    "--count", default=1000, show_default=True, type=click.IntRange(min=1), help="Total inputs of each kind, including earlier runs."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the inputs.")
@click.option("--minutes", default=float("inf"), help="Stop each kind after that many minutes (default: at its count).")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Number of processes, with seeds from --seed on.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for state and faults (default: fuzz in the cache).")
@click.option("--show", type=click.IntRange(min=0), help="Only make and read this input, and print the outcome.")
@click.option("--read", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Only read the input in this folder.")
def main(
    kinds: tuple[str, ...], count: int, seed: int, minutes: float, jobs: int, out: Path | None, show: int | None, folder: Path | None
) -> None:
    """Fuzz KINDS one after another."""
    out = out or cache_root() / "fuzz"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as pictures:
        real = str(cache_root())
        if not {"text", "mmproj", "decoder", "settings"} & set(kinds):  # these search the build there
            os.environ["MBQ_GGUF_CACHE"] = pictures  # pictures in data: URLs would fill the user's
        try:
            if show is not None or folder is not None:
                sys.exit(one(kinds[0], seed, show or 0, out, folder))
            if jobs > 1:
                states = spread(kinds, count, seed, minutes, jobs, out)
            else:
                states = [fuzz(kind, count, seed, minutes, out) for kind in kinds]
        except USER_ERRORS as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        finally:
            os.environ["MBQ_GGUF_CACHE"] = real
    sys.exit(1 if any(state.unknown(known_faults()) for state in states) else 0)


if __name__ == "__main__":
    main()
