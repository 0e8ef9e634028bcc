"""W4A8 and W8A8: Q4_0 and Q8_0 blocks that repeat one fp16 scale over the whole row (docs/format.md).

Any llama.cpp reads them as Q4_0 or Q8_0. The patched one, when the file's metadata say so, multiplies them with integer sums over the whole
row. For range search and rounding a row is therefore one block; :func:`for_rows` gives the quant type for rows of one length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mbq_gguf.formats import legacy
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType

BLOCK = 32
VERSION = 1  # mbq.row_scale.version


@dataclass(frozen=True)
class RowScale:
    """The ggml type of the blocks, its id and size in bytes, and the largest code; the smallest code is -(largest + 1)."""

    stored: str
    type_id: int
    type_size: int
    largest: int


ROW_SCALES = {"W4A8": RowScale("Q4_0", 2, 18, 7), "W8A8": RowScale("Q8_0", 8, 34, 127)}


def stored_as(name: str) -> str:
    """The ggml type that a tensor of type ``name`` has in a file; differs from ``name`` only for these two."""
    return ROW_SCALES[name].stored if name in ROW_SCALES else name


def metadata(tensors: list[str]) -> dict[str, int | list[str]]:
    """The keys that tell the patched llama.cpp which tensors of a file have one scale per row."""
    return {"mbq.row_scale.version": VERSION, "mbq.row_scale": tensors} if tensors else {}


def pack(name: str, codes: Bytes, scale: Floats) -> Bytes:
    """Pack codes [rows, columns] (uint8, counted from the lowest) and fp16-exact scales [rows, 1] to bytes [rows, row_bytes]."""
    pack_blocks = legacy.pack_q4_0 if name == "W4A8" else legacy.pack_q8_0
    blocks = codes.reshape(-1, BLOCK)
    scales = np.repeat(scale, codes.shape[1] // BLOCK, axis=0)
    return pack_blocks(blocks, scales, np.zeros_like(scales)).reshape(len(codes), -1)


def unpack(name: str, data: Bytes) -> tuple[Bytes, Floats]:
    """The inverse of :func:`pack`: codes and scales; a row's scale is that of its first block, as in the products."""
    blocks = data.reshape(-1, ROW_SCALES[name].type_size)
    payload = blocks[:, 2:]
    codes = np.concatenate([payload & 15, payload >> 4], axis=1) if name == "W4A8" else payload ^ np.uint8(128)
    scale = np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)
    return codes.reshape(len(data), -1), scale


def _quantize(name: str, weights: Floats) -> Bytes:
    """Round to nearest with scale max |w| / 7 (or 127) per row, as MBQ's authors do for W4A8; float32 throughout."""
    largest = ROW_SCALES[name].largest
    scale = (np.abs(weights).max(axis=1, keepdims=True) / np.float32(largest)).clip(max=65504).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.rint(weights * inverse).clip(-largest - 1, largest)
    return pack(name, (codes + np.float32(largest + 1)).astype(np.uint8), scale)


def _dequantize(name: str, data: Bytes) -> Floats:
    codes, scale = unpack(name, data)
    return (codes.astype(np.float32) - np.float32(ROW_SCALES[name].largest + 1)) * scale


def _quant_type(name: str) -> QuantType:
    of = ROW_SCALES[name]
    return QuantType(
        name, of.type_id, BLOCK, of.type_size, lambda weights: _quantize(name, weights), lambda data: _dequantize(name, data), "F16"
    )


QUANT_TYPES = {name: _quant_type(name) for name in ROW_SCALES}


@cache
def for_rows(name: str, columns: int) -> QuantType:
    """The quant type ``name`` for rows of ``columns`` weights, each row one block."""
    base = QUANT_TYPES[name]
    return replace(base, block_size=columns, type_size=base.row_bytes(columns))
