"""MBQ3 and MBQ3_64: 3-bit codes, one fp16 scale and one fp16 minimum per block (bit layout: docs/format.md).

A block of N weights (N = 128 or 64) is ``d`` fp16, ``m`` fp16, ``ql`` N/4 bytes, ``qh`` N/8 bytes, and weight i is d * code(i) + m.
With i = (N/4) * plane + byte: the two low bits of the code are bits 2*plane and 2*plane + 1 of ql[byte], the high bit is bit
(2*plane + 2) % 8 + byte // (N/8) of qh[byte % (N/8)]. So for planes 0 to 2 the high bit lies just above the low ones: a mask of ql and a
mask of qh give 1, 4 or 16 times the code without any shift, at most 7 * 16 = 112, which still fits a signed byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType

LEVELS = 7  # the largest 3-bit code
F16_MAX = np.float32(65504.0)
PLANES = 4
SCALE_BYTES = 4  # at the start of a block: scale and minimum, or scale words


def block_parameters(blocks: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum from the range of each block [n, N], rounded to fp16 (returned as float32 [n, 1])."""
    # -0 becomes +0: which of the two zeros min() returns depends on the order of its comparisons.
    low = blocks.min(axis=1, keepdims=True) + np.float32(0)
    high = blocks.max(axis=1, keepdims=True) + np.float32(0)
    # Divide before subtracting: the range itself can overflow float32. ggml-mbq.c does the same operations in the same order.
    scale = np.minimum(high / np.float32(LEVELS) - low / np.float32(LEVELS), F16_MAX)
    minimum = np.clip(low, -F16_MAX, F16_MAX)
    return scale.astype(np.float16).astype(np.float32), minimum.astype(np.float16).astype(np.float32)


def nearest_codes(blocks: Floats, scale: Floats, minimum: Floats) -> Bytes:
    """Codes 0 to 7 nearest to ``blocks`` [n, N] on the grid scale * code + minimum; ties go to the even code."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
        steps = (blocks - minimum) * inverse
    codes: Bytes = np.rint(np.clip(steps, np.float32(0), np.float32(LEVELS))).astype(np.uint8)
    return codes


def pack_blocks(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """Codes [n, N] with fp16-exact scale and minimum [n, 1] to packed blocks [n, 4 + 3 N / 8]."""
    packed: Bytes = np.concatenate([pair_bytes(scale, minimum), pack_planes(codes)], axis=1)
    return packed


def pair_bytes(scale: Floats, minimum: Floats) -> Bytes:
    """The first bytes [n, 4] of blocks with scale and minimum [n, 1]."""
    return np.concatenate([scale, minimum], axis=1).astype("<f2").view(np.uint8)


def unpack_blocks(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """The inverse of :func:`pack_blocks`: codes [n, N], scale [n, 1], minimum [n, 1]."""
    pair = np.ascontiguousarray(blocks[:, :SCALE_BYTES]).view("<f2").astype(np.float32)
    return unpack_planes(blocks[:, SCALE_BYTES:]), pair[:, :1], pair[:, 1:]


def pack_planes(codes: Any, joined: Callable[..., Any] = np.concatenate) -> Any:
    """Codes [n, N] to ql and qh [n, 3 N / 8], uint8; of a tensor a tensor, with PyTorch's ``joined``."""
    n, size = codes.shape
    planes = codes.reshape(n, PLANES, size // PLANES)
    high = (planes >> 2).reshape(n, PLANES, 2, size // 8)
    ql = [(planes[:, plane] & 3) << 2 * plane for plane in range(PLANES)]
    qh = [high[:, plane, half] << (2 * plane + 2) % 8 + half for plane in range(PLANES) for half in range(2)]
    return joined([reduce(or_, ql), reduce(or_, qh)], axis=1)


def unpack_planes(packed: Bytes) -> Bytes:
    """The inverse of :func:`pack_planes`."""
    n, size = packed.shape[0], packed.shape[1] * 8 // 3
    ql, qh = packed[:, : size // 4], packed[:, size // 4 :]
    codes = np.empty((n, PLANES, size // PLANES), np.uint8)
    for plane in range(PLANES):
        bit = (2 * plane + 2) % 8
        high = np.concatenate([qh >> bit, qh >> (bit + 1)], axis=1) & 1
        codes[:, plane] = (ql >> (2 * plane)) & 3 | high << 2
    return codes.reshape(n, size)


def _quant_type(name: str, type_id: int, size: int, fallback: str) -> QuantType:
    type_size = SCALE_BYTES + 3 * size // 8

    def quantize(weights: Floats) -> Bytes:
        rows, columns = weights.shape
        blocks = weights.reshape(-1, size)
        scale, minimum = block_parameters(blocks)
        return pack_blocks(nearest_codes(blocks, scale, minimum), scale, minimum).reshape(rows, columns // size * type_size)

    def dequantize(data: Bytes) -> Floats:
        codes, scale, minimum = unpack_blocks(data.reshape(-1, type_size))
        # Product, then sum, each rounded to float32: what C does without contraction.
        return (codes.astype(np.float32) * scale + minimum).reshape(data.shape[0], -1)

    return QuantType(name, type_id, size, type_size, quantize, dequantize, fallback=fallback)


MBQ3 = _quant_type("MBQ3", 120, 128, "MBQ3_64")
MBQ3_64 = _quant_type("MBQ3_64", 121, 64, "Q4_0")
