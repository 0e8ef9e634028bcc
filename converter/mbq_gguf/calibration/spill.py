"""Decides where activations are kept: on the GPU that computed them, on the host while there is memory, then in mapped, unlinked files.

A tensor in a mapped file is an ordinary tensor; the system writes it out and reclaims its pages when memory is needed. Disk space is
reserved before anything is written, so a full disk gives an error message, not a signal.
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

SMALLEST = 1 << 20  # smaller tensors are not worth a file


@dataclass
class Room:
    """``limit`` is the number of bytes that the process may hold before activations go to files in ``folder``; ``spilled`` counts the bytes
    there. ``card`` bytes are left free on the GPU for what is computed next (None: no activations stay there).
    """

    limit: int
    folder: Path
    card: int | None = None
    spilled: int = 0


_rooms: list[Room] = []


@contextmanager
def spilling(limit: int, folder: Path, card: int | None = None) -> Iterator[Room]:
    """While open, :func:`kept` uses that much memory."""
    _rooms.append(Room(limit, folder, card))
    try:
        yield _rooms[-1]
    finally:
        _rooms.pop()


def kept(x: torch.Tensor, dtype: torch.dtype | None = None, there: int = 0) -> torch.Tensor:
    """``x`` at a place where it can stay, in ``dtype`` (None: unchanged): where it is, on the host if the GPU is full, or in a file if host
    memory is used up. ``there`` are bytes that have to stay free on the GPU besides. Raises UserError if the disk is full too.
    """
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
    """An empty tensor in a file of ``size`` bytes in ``folder``, which is deleted with the tensor."""
    try:
        with NamedTemporaryFile(prefix=".mbq-gguf-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"activations of {size / 1e6:.0f} MB do not fit into memory, nor into {folder} ({describe(error)}): free some space, give "
            "--work-dir on another disk, or fewer --samples"
        ) from error
