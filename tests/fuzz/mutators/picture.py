"""A picture with faults in its parts: chunks of PNG, segments of JPEG, chunks of WebP; other formats are damaged anywhere.

Lengths and checksums are mended after most edits, so that readers get past them.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

from mutators import raw

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KINDS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"gAMA", b"sBIT")
SIDES = (0, 1, 2, 7, 255, 256, 4096, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
MARKERS = (0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0x01, 0xFF)
Part = tuple[bytes, bytes]  # its kind and its content


def mutate(seed: bytes, draw: random.Random) -> tuple[bytes, str]:
    """``seed`` spoilt, and what was done to it."""
    for opening, split, join in FORMATS:
        if seed.startswith(opening) and draw.random() < 0.8:
            parts, done = split(seed), []
            for _ in range(draw.choice((1, 1, 2, 3))):
                edit = draw.choice(EDITS)
                edit(parts, draw)
                done.append(edit.__name__)
            return join(parts, draw), " ".join(done)
    return raw.mutate(seed, draw)


def drop(parts: list[Part], draw: random.Random) -> None:
    """A part is missing."""
    if parts:
        del parts[draw.randrange(len(parts))]


def double(parts: list[Part], draw: random.Random) -> None:
    """A part stands there twice."""
    if parts:
        parts.insert(draw.randrange(len(parts) + 1), draw.choice(parts))


def rename(parts: list[Part], draw: random.Random) -> None:
    """A part is called what another is."""
    if parts:
        index = draw.randrange(len(parts))
        names = PNG_KINDS if len(parts[index][0]) == 4 else tuple(bytes([marker]) for marker in MARKERS)
        parts[index] = (draw.choice(names), parts[index][1])


def spoil(parts: list[Part], draw: random.Random) -> None:
    """A part's content is damaged."""
    if parts:
        index = draw.randrange(len(parts))
        parts[index] = (parts[index][0], raw.mutate(parts[index][1], draw)[0])


def head(parts: list[Part], draw: random.Random) -> None:
    """The first part, where sides and depths stand, has a number at an edge."""
    if parts:
        index = draw.randrange(min(2, len(parts)))
        content, start = bytearray(parts[index][1]), draw.choice((0, 1, 3, 4, 5, 8, 9, 10, 12))
        number = draw.choice(SIDES)
        content[start : start + 4] = draw.choice((struct.pack(">I", number), struct.pack("<I", number), bytes([number & 255])))
        parts[index] = (parts[index][0], bytes(content))


def inflate(parts: list[Part], draw: random.Random) -> None:
    """Compressed content that gives more than was announced, less, or none that can be read."""
    packed = [index for index, part in enumerate(parts) if part[0] in (b"IDAT", b"zTXt", b"iCCP")]
    if packed:
        index = draw.choice(packed)
        content = draw.choice((zlib.compress(bytes(1 << 20), 1), zlib.compress(b""), zlib.compress(draw.randbytes(100), 0), bytes(40)))
        parts[index] = (parts[index][0], content)


def _split_png(data: bytes) -> list[Part]:
    parts, at = [], len(PNG)
    while at < len(data):
        length = struct.unpack_from(">I", data, at)[0]
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def _join_png(parts: list[Part], draw: random.Random) -> bytes:
    wrong = draw.randrange(20 * len(parts) + 1)  # seldom a checksum that is none
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ (index == wrong))
        for index, (kind, content) in enumerate(parts)
    ]
    return PNG + b"".join(chunks)


def _split_jpeg(data: bytes) -> list[Part]:
    parts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        length = struct.unpack_from(">H", data, at + 2)[0]
        end = at + 2 + length
        if data[at + 1] == 0xDA:  # what is coded follows until the next marker
            while end < len(data) - 1 and not (data[end] == 0xFF and data[end + 1] not in (0, *range(0xD0, 0xD8))):
                end += 1
        parts.append((data[at + 1 : at + 2], data[at + 4 : end]))
        at = end
    return parts


def _join_jpeg(parts: list[Part], draw: random.Random) -> bytes:
    joined = b"\xff\xd8"
    for kind, content in parts:
        length = 2 + (content[0] * 2 + 4 if kind == b"\xda" and content else len(content))
        if draw.random() < 0.03:
            length = draw.choice((0, 1, 2, 3, length + 1, 65535))
        joined += b"\xff" + kind + struct.pack(">H", length & 0xFFFF) + content
    return joined + (b"\xff\xd9" if draw.random() < 0.9 else b"")


def _split_webp(data: bytes) -> list[Part]:
    parts, at = [], 12
    while at + 8 <= len(data):
        length = struct.unpack_from("<I", data, at + 4)[0]
        parts.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts


def _join_webp(parts: list[Part], draw: random.Random) -> bytes:
    chunks = b""
    for kind, content in parts:
        length = draw.choice(SIDES) if draw.random() < 0.03 else len(content)
        chunks += kind + struct.pack("<I", length) + content + bytes(len(content) % 2)
    size = draw.choice(SIDES) if draw.random() < 0.03 else 4 + len(chunks)
    return b"RIFF" + struct.pack("<I", size) + b"WEBP" + chunks


EDITS = (drop, double, rename, spoil, spoil, head, head, inflate)
Format = tuple[bytes, Callable[[bytes], list[Part]], Callable[[list[Part], random.Random], bytes]]
FORMATS: tuple[Format, ...] = (
    (PNG, _split_png, _join_png),
    (b"\xff\xd8", _split_jpeg, _join_jpeg),
    (b"RIFF", _split_webp, _join_webp),
)
