"""Damage that knows nothing of the format: bits, stretches, the end."""

from __future__ import annotations

import random

MOST = 4  # edits at once
HEAD = 64  # bytes that are hit more often than the rest: lengths and counts stand there


def mutate(seed: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One to :data:`MOST` edits of ``seed``."""
    data, done = bytearray(seed), []
    for _ in range(draw.randint(1, MOST)):
        edit = draw.choice(EDITS)
        edit(data, draw)
        done.append(edit.__name__)
    return bytes(data), " ".join(done)


def flip(data: bytearray, draw: random.Random) -> None:
    """One bit."""
    if data:
        data[place(data, draw)] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    """One to eight bytes of 0, 255, or anything."""
    start, length = place(data, draw), draw.randint(1, 8)
    data[start : start + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))


def remove(data: bytearray, draw: random.Random) -> None:
    """A stretch less."""
    start = place(data, draw)
    del data[start : start + draw.choice((1, 4, 8, 64))]


def repeat(data: bytearray, draw: random.Random) -> None:
    """A stretch twice."""
    start = place(data, draw)
    data[start:start] = data[start : start + draw.choice((1, 4, 8, 64))]


def cut(data: bytearray, draw: random.Random) -> None:
    """Nothing after a point."""
    del data[place(data, draw) :]


def place(data: bytearray, draw: random.Random) -> int:
    """Somewhere in ``data``."""
    size = len(data)
    return draw.randrange(min(size, HEAD) if draw.random() < 0.3 else size) if size else 0


EDITS = (flip, flip, overwrite, overwrite, remove, repeat, cut)
