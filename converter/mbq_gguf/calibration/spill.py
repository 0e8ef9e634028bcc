"""Where activations wait: on the card that made them and in the host's memory as long as there is room, then in files on disk, mapped,
which no name leads to.

What lies in a mapped file is an ordinary tensor; the system writes it out and takes its pages back when others need them. Disk space is
reserved before anything is written, so a full disk is a sentence and no signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from mbq_gguf.errors import UserError, describe
from mbq_gguf.memory import available, process_bytes

SMALLEST = 1 << 20  # bytes that are worth a file


@dataclass
class Room:
    """``limit`` bytes are what the process may hold itself before activations go to files in ``folder``; ``spilled`` counts theirs. So many
    bytes of a ``card`` are left free for whatever is computed there next (None: no activation stays there)."""

    limit: int
    folder: Path
    card: int | None = None
    spilled: int = 0


_rooms: list[Room] = []


@contextmanager
def spilling(limit: int, folder: Path, card: int | None = None) -> Iterator[Room]:
    """While open, :func:`kept` has that much room."""
    _rooms.append(Room(limit, folder, card))
    try:
        yield _rooms[-1]
    finally:
        _rooms.pop()


def kept(x: torch.Tensor, dtype: torch.dtype | None = None, there: int = 0) -> torch.Tensor:
    """``x`` where it can wait, in ``dtype`` (None: its own): where it is, or on the host where a card has no room, or in a file where
    memory has ended; ``there`` are bytes on a card of what it is to have room for. UserError where the disk has ended, too."""
    size = x.numel() * (dtype or x.dtype).itemsize
    room = _rooms[-1] if _rooms else None
    if x.device.type == "cuda" and room and room.card is not None and room.card + size <= available(x.device) + there:
        return x.to(dtype=dtype)
    if room is None or size < SMALLEST or process_bytes() + size <= room.limit:
        return x.to(device="cpu", dtype=dtype)
    made = _in_file(x.shape, dtype or x.dtype, size, room.folder)
    room.spilled += size
    return made.copy_(x)


def _in_file(shape: torch.Size, dtype: torch.dtype, size: int, folder: Path) -> torch.Tensor:
    """An empty tensor over a file of ``size`` bytes in ``folder``, which is gone when the tensor is."""
    try:
        with NamedTemporaryFile(prefix=".mbq-gguf-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"activations of {size / 1e6:.0f} MB do not fit into memory, nor into {folder} ({describe(error)}): free some space, give "
            "--work-dir on another disk, or fewer --samples"
        ) from error
