"""Corrupts the data of a GGUF file: blocks of noise, NaN scales, too few bytes."""

from __future__ import annotations

import random
import struct

from mutators.gguf_document import Document

# Where the types that this project writes keep their 16-bit scales: bytes of a block, and offsets in it.
BLOCKS = {
    2: (18, (0,)),
    8: (34, (0,)),
    1: (2, (0,)),
    30: (2, (0,)),
    120: (52, (0, 2)),
    121: (28, (0, 2)),
    122: (52, (0, 2)),
    123: (28, (0, 2)),
}
HALVES = tuple(struct.pack("<H", bits) for bits in (0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7F80, 0x7FC0))


def noise(document: Document, draw: random.Random) -> None:
    """A tensor's first bytes are anything."""
    if document.tensors and document.data:
        start = draw.choice(document.tensors).offset % len(document.data)
        length = min(draw.choice((4, 64, 2048)), len(document.data) - start)
        document.data = document.data[:start] + draw.randbytes(length) + document.data[start + length :]


def scales(document: Document, draw: random.Random) -> None:
    """Scales of some blocks of one tensor are NaN, infinite, zero or denormal."""
    known = [tensor for tensor in document.tensors if tensor.kind in BLOCKS]
    if known:
        tensor, data = draw.choice(known), bytearray(document.data)
        size, places = BLOCKS[tensor.kind]
        for _ in range(draw.choice((1, 4, 100))):
            start = tensor.offset + draw.randrange(8) * size + draw.choice(places)
            if start + 2 <= len(data):
                data[start : start + 2] = draw.choice(HALVES)
        document.data = bytes(data)


def single(document: Document, draw: random.Random) -> None:
    """A tensor of float32 holds a value that is no number, or hardly one."""
    known = [tensor for tensor in document.tensors if tensor.kind == 0]
    if known:
        start = draw.choice(known).offset
        number = struct.pack("<f", draw.choice((float("nan"), float("inf"), 3e38, -3e38, 0.0, 1e-45)))
        document.data = document.data[:start] + number + document.data[start + 4 :]


def cut(document: Document, draw: random.Random) -> None:
    """The file ends too early, by a byte or by much."""
    document.data = document.data[: max(0, len(document.data) - draw.choice((1, 31, 32, 33, 1000, len(document.data))))]


def grow(document: Document, draw: random.Random) -> None:
    """Something stands after the end."""
    document.data += draw.randbytes(draw.choice((1, 32, 100)))


EDITS = (noise, scales, scales, single, cut, grow)
