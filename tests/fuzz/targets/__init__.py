"""What is fuzzed: each target makes a spoilt input in a folder and reads it.

``make(draw, folder)`` depends on ``draw`` alone and says in words what is spoilt. ``read(folder)`` says "taken" or "refused"; whatever else
it raises, and the end of the process, is a fault. ``open()`` loads what reading needs, once, before the processes that read are forked.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol

TAKEN, REFUSED = "taken", "refused"


class Target(Protocol):
    """One reader and the inputs that it is given."""

    def make(self, draw: random.Random, folder: Path) -> str: ...
    def open(self) -> None: ...
    def read(self, folder: Path) -> str: ...


class Spoilt:
    """A target's inputs: one of its seeds, which ``mutator`` spoils, under the name ``file``. Subclasses open and read."""

    mutator: ClassVar[ModuleType]
    file: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]  # of seeds/

    def __init__(self) -> None:
        self.seeds = [seed for folder in self.folders for seed in seeds(folder)]

    def make(self, draw: random.Random, folder: Path) -> str:
        data, done = self.mutator.mutate(draw.choice(self.seeds), draw)
        (folder / self.file).write_bytes(data)
        return str(done)


def refusal(error: Exception) -> str:
    """:data:`REFUSED`, if what the user sees is one sentence that also says what to do."""
    sentence = str(error)
    assert "\n" not in sentence.strip(), f"more than a line: {sentence[:300]!r}"
    assert ": " in sentence, f"nothing to do: {sentence[:300]!r}"
    return REFUSED


def seeds(folder: str) -> list[bytes]:
    """The committed seeds of a kind, in the order of their names."""
    return [file.read_bytes() for file in sorted((Path(__file__).parents[1] / "seeds" / folder).iterdir())]
