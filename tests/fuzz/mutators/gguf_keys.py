"""Corrupts the metadata of a GGUF file: keys that are missing, duplicated, or have another type, length or value; this project's keys."""

from __future__ import annotations

import random
import struct

from mutators.gguf_document import ARRAY, STRING, WIDTHS, Document, Key, string, strings, u32, u64

EDGES = (0, 1, 2, 3, 5, 7, 8, 63, 64, 65, 127, 128, 129, 255, 256, 512, 1024, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE = (*EDGES, 1 << 32, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-6, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (b"", b"\x00", b"\xff\xfe", b"a" * 300, b"%s%n", "\u202e\u00e9\U0001f600".encode(), b"[red]", b"\x1b[31m", b"llama", b"clip")
ARCHITECTURES = (
    b"llama",
    b"qwen2",
    b"qwen2vl",
    b"gemma3",
    b"mamba",
    b"bert",
    b"t5",
    b"rwkv6",
    b"deepseek2",
    b"gpt2",
    b"clip",
    b"phi3",
    b"",
)


def drop(document: Document, draw: random.Random) -> None:
    """A key is missing."""
    if document.keys:
        del document.keys[draw.randrange(len(document.keys))]


def double(document: Document, draw: random.Random) -> None:
    """A key stands there twice."""
    if document.keys:
        document.keys.insert(draw.randrange(len(document.keys) + 1), draw.choice(document.keys))


def rename(document: Document, draw: random.Random) -> None:
    """A key has another's name, or an odd one."""
    index, name = _any(document, draw), draw.choice((*TEXTS, draw.choice(document.keys).name if document.keys else b"x"))
    if index is not None:
        document.keys[index] = document.keys[index]._replace(name=name)


def revalue(document: Document, draw: random.Random) -> None:
    """A key has another value of its own type."""
    index = _any(document, draw)
    if index is not None:
        key = document.keys[index]
        array = key.kind == ARRAY and len(key.payload) >= 12  # another edit may have called something else an array
        document.keys[index] = key._replace(payload=_array(key.payload, draw) if array else value(key.kind, draw))


def retype(document: Document, draw: random.Random) -> None:
    """A key has a value of another type, whole."""
    index, kind = _any(document, draw), draw.choice((*WIDTHS, STRING))
    if index is not None:
        document.keys[index] = document.keys[index]._replace(kind=kind, payload=value(kind, draw))


def mistype(document: Document, draw: random.Random) -> None:
    """A key's type is another than its bytes are of."""
    index = _any(document, draw)
    if index is not None:
        document.keys[index] = document.keys[index]._replace(kind=draw.choice((*WIDTHS, STRING, ARRAY, 13, 255, 1 << 31)))


def exchange(document: Document, draw: random.Random) -> None:
    """Two keys have each other's values."""
    if len(document.keys) > 1:
        first, second = draw.sample(range(len(document.keys)), 2)
        one, other = document.keys[first], document.keys[second]
        document.keys[first], document.keys[second] = Key(one.name, *other[1:]), Key(other.name, *one[1:])


def architecture(document: Document, draw: random.Random) -> None:
    """The file says that it is of another architecture, with the keys of its own."""
    name = draw.choice(ARCHITECTURES)
    if draw.random() < 0.5:  # keys go along
        document.keys = [key._replace(name=key.name.replace(b"qwen2vl.", name + b".")) for key in document.keys]
    document.put(Key(b"general.architecture", STRING, string(name)))


def ours(document: Document, draw: random.Random) -> None:
    """A key of this project has an odd value."""
    names = [tensor.name for tensor in document.tensors] or [b"x"]
    document.put(
        draw.choice(
            (
                Key(b"mbq.hadamard.ffn_down", 4, u32(draw.choice(EDGES))),
                Key(b"mbq.hadamard.ffn_down", 10, u64(draw.choice(WIDE))),
                Key(b"mbq.hadamard.ffn_down", STRING, string(draw.choice(TEXTS))),
                Key(b"mbq.row_scale.version", 4, u32(draw.choice((0, 1, 1, 1, 2, 1 << 31)))),
                Key(b"mbq.row_scale", ARRAY, strings(draw.choices((*names, *TEXTS), k=draw.randint(0, 4)))),
                Key(b"mbq.row_scale", ARRAY, strings(names)),
                Key(b"mbq.row_scale", 4, u32(1)),
                Key(b"mbq.ratio.0", 6, value(6, draw)),
                Key(b"clip.vision.image_min_pixels", 4, u32(draw.choice(EDGES))),
                Key(b"clip.vision.image_max_pixels", 4, u32(draw.choice(EDGES))),
            )
        )
    )


def static_ranges(document: Document, draw: random.Random) -> None:
    """Static ranges of activations, good ones or odd ones, and sinks."""
    document.put(Key(b"mbq.act.version", 4, u32(draw.choice((1,) * 8 + EDGES))))
    for _ in range(draw.randint(1, 4)):
        site, kind = draw.choice((b"qkv", b"o", b"gate_up", b"down", b"x")), draw.choice((b"text", b"vision"))
        real = draw.random() < 0.7
        values = [draw.choice((0.5, 4.0, 1e-28, 3e38)) if real else draw.choice(REALS) for _ in range(draw.choice((0, 1, 1, 1, 2, 1000)))]
        content = u32(6) + u64(len(values)) + struct.pack(f"<{len(values)}f", *values)
        document.put(Key(b"mbq.act.range." + site + b"." + kind, ARRAY, content if draw.random() < 0.9 else _array(content, draw)))
    for name in (b"positions", b"tokens"):
        sinks = draw.choices(EDGES if draw.random() < 0.3 else range(64), k=draw.choice((0, 1, 3, 1000)))
        content = u32(5) + u64(len(sinks)) + b"".join(map(u32, sinks))
        document.put(Key(b"mbq.act.sink." + name, ARRAY, content if draw.random() < 0.9 else _array(content, draw)))


def value(kind: int, draw: random.Random) -> bytes:
    """A value of GGUF's type ``kind``, small or at an edge."""
    if kind == STRING:
        return string(draw.choice(TEXTS))
    if kind in (6, 12):
        return struct.pack("<f" if kind == 6 else "<d", draw.choice(REALS))
    width = WIDTHS.get(kind, 8)
    return (draw.choice(WIDE) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _array(payload: bytes, draw: random.Random) -> bytes:
    """An array with another type, count, or content."""
    kind, length = struct.unpack_from("<IQ", payload)
    content = payload[12:]
    how = draw.randrange(6)
    if how == 0:
        return u32(draw.choice((*WIDTHS, STRING, ARRAY, 99))) + u64(length) + content
    if how == 1:
        return u32(kind) + u64(draw.choice((*WIDE, length - 1, length + 1))) + content
    if how == 2:  # empty
        return u32(kind) + u64(0)
    if kind not in WIDTHS:
        fewer = strings(draw.choices(TEXTS, k=draw.choice((1, 3, min(length, 1000)))))
        return u32(kind) + u64(length) + bytes(len(content)) if how == 3 else fewer
    width = WIDTHS[kind]
    if how == 3:  # shorter, whole
        kept = draw.randrange(len(content) // width + 1)
        return u32(kind) + u64(kept) + content[: kept * width]
    if how == 4:  # all the same
        return u32(kind) + u64(length) + value(kind, draw) * (len(content) // width)
    place = draw.randrange(len(content) // width + 1)
    return u32(kind) + u64(length) + content[: place * width] + value(kind, draw) + content[(place + 1) * width :]


def _any(document: Document, draw: random.Random) -> int | None:
    """One of the keys, those of sizes oftener than those of descriptions."""
    sizes = [index for index, key in enumerate(document.keys) if not key.name.startswith((b"general.", b"tokenizer."))]
    if sizes and draw.random() < 0.7:
        return draw.choice(sizes)
    return draw.randrange(len(document.keys)) if document.keys else None


EDITS = (drop, double, rename, revalue, revalue, revalue, retype, mistype, exchange, architecture, ours, ours, static_ranges)
