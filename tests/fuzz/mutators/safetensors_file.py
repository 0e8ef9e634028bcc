"""A safetensors file: 8 bytes of length, a header in JSON, the data; the header spoilt as JSON, its offsets and shapes, its length."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from mutators import json_text, raw

TYPES = ("F32", "BF16", "F16", "I64", "BOOL", "U8", "F8_E4M3", "F64", "F4", "X", "", None)
NUMBERS = (0, 1, 2, 3, 7, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 53) + 1, (1 << 63) - 1, (1 << 64) - 1, 1 << 64, -1, 0.5)


def mutate(seed: bytes, draw: random.Random) -> tuple[bytes, str]:
    """``seed`` spoilt, and what was done to it."""
    length = struct.unpack_from("<Q", seed)[0]
    header, data = json.loads(seed[8 : 8 + length]), seed[8 + length :]
    how = draw.randrange(10)
    if how < 4:
        text, done = json_text.mutate(header, draw)
    else:
        done = " ".join(_entry(header, draw) for _ in range(draw.choice((1, 1, 2, 3))))
        text = json.dumps(header).encode()
    said = len(text)
    if draw.random() < 0.1:
        said, done = draw.choice((0, 1, said - 1, said + 1, 1 << 31, 100_000_001, 1 << 63, (1 << 64) - 1)), f"{done} length"
    if draw.random() < 0.2:
        data, done = draw.choice((b"", data[:-1], data + b"x", data * 2, data[: len(data) // 2])), f"{done} data"
    whole = struct.pack("<Q", said % (1 << 64)) + text + data
    if draw.random() < 0.1:
        whole, words = raw.mutate(whole, draw)
        done = f"{done} {words}"
    return whole, done


def _entry(header: dict[str, Any], draw: random.Random) -> str:
    """One tensor's line."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return "nothing"
    name, other = draw.choice(names), draw.choice(names)
    entry = header[name]
    how = draw.choice(("dtype", "shape", "offsets", "exchange", "drop", "double", "metadata"))
    if how == "dtype":
        entry["dtype"] = draw.choice(TYPES)
    elif how == "shape":
        entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.choice((0, 1, 2, 3, 9)))]
    elif how == "offsets":
        entry["data_offsets"] = [draw.choice((*NUMBERS, *entry["data_offsets"])) for _ in range(draw.choice((1, 2, 2, 2, 3)))]
    elif how == "exchange":
        header[name], header[other] = header[other], header[name]
    elif how == "drop":
        del header[name]
    elif how == "double":
        header[name + "x"] = dict(entry)
    else:
        header["__metadata__"] = draw.choice((None, {}, {"data": 1}, {"data": "{}"}, {"checksum": ""}, [], "x", {"data": "[" * 3000}))
    return how
