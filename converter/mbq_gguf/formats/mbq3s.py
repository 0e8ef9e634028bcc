"""MBQ3S and MBQ3S_64: the codes and sizes of MBQ3 and MBQ3_64 with groups half as large (bit layout: docs/format.md).

MBQ3 stores an fp16 scale and an fp16 minimum per block. These types store one 16-bit word for each half of the block instead: the upper ten
bits are the scale d (an fp16 number without its sign and its five lowest bits), the lower six the zero point z in eighths of a step. Weight
i is d * (code(i) - z / 8). At the same size, the reference VLM loses a fifth less on text than with MBQ3 and MBQ3_64 (docs/results.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mbq_gguf.formats.mbq3 import F16_MAX, LEVELS, SCALE_BYTES, nearest_codes, pack_planes, unpack_planes
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType

HALVES = 2  # groups per block
DROPPED_BITS = 5  # of the scale's fp16 fraction
LARGEST_SCALE = 0x7BFF >> DROPPED_BITS  # in the word's upper bits; the next one would be fp16's infinity
ZERO_BITS = 6
ZERO_STEPS = 8  # steps of the zero point per step of the weights
LARGEST_ZERO = (1 << ZERO_BITS) - 1


def group_parameters(groups: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum, as scale words store them, from the range of each group [n, N] and zero (returned as float32 [n, 1])."""
    low = np.minimum(groups.min(axis=1, keepdims=True), np.float32(0)) + np.float32(0)
    high = np.maximum(groups.max(axis=1, keepdims=True), np.float32(0)) + np.float32(0)
    # Divide before subtracting: the range itself can overflow float32. ggml-mbq.c does the same operations in the same order.
    scale = np.minimum(high / np.float32(LEVELS) - low / np.float32(LEVELS), F16_MAX)
    return nearest_parameters(scale, low)


def nearest_parameters(scale: Floats, minimum: Floats) -> tuple[Floats, Floats]:
    """The representable scale nearest to each of ``scale``, and with it the representable minimum nearest to each of ``minimum``."""
    bits = scale.astype(np.float16).view(np.uint16)
    upper = (bits + (bits >> DROPPED_BITS & 1) + 15) >> DROPPED_BITS  # ties to even
    held = _scale(np.minimum(upper, LARGEST_SCALE))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(held > 0, np.float32(1) / held, np.float32(0)).astype(np.float32)
        zero = np.rint(np.clip(minimum * np.float32(-ZERO_STEPS) * inverse, np.float32(0), np.float32(LARGEST_ZERO)))
    return held, _minimum(held, zero)


def pack_blocks(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """Pack codes [n, N] with representable scale and minimum [n, 2] to blocks [n, 4 + 3 N / 8]."""
    return np.concatenate([scale_words(scale, minimum), pack_planes(codes)], axis=1)


def scale_words(scale: Floats, minimum: Floats) -> Bytes:
    """The first bytes [n, 4] of blocks with scale and minimum [n, 2]."""
    upper = scale.astype(np.float16).view(np.uint16) >> DROPPED_BITS
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(scale > 0, np.rint(minimum * np.float32(-ZERO_STEPS) / scale), 0).astype(np.uint16)
    return (upper << ZERO_BITS | zero).astype("<u2").view(np.uint8)


def unpack_blocks(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """The inverse of :func:`pack_blocks`: codes [n, N], scale [n, 2], minimum [n, 2]."""
    words = np.ascontiguousarray(blocks[:, :SCALE_BYTES]).view("<u2")
    scale = _scale(words >> ZERO_BITS)
    return unpack_planes(blocks[:, SCALE_BYTES:]), scale, _minimum(scale, (words & LARGEST_ZERO).astype(np.float32))


def _scale(upper: npt.NDArray[Any]) -> Floats:
    return (upper.astype(np.uint16) << DROPPED_BITS).view(np.float16).astype(np.float32)


def _minimum(scale: Floats, zero: Floats) -> Floats:
    minimum: Floats = -(scale * zero) / np.float32(ZERO_STEPS)  # exact: six bits times six
    return minimum


def _quant_type(name: str, type_id: int, size: int, fallback: str) -> QuantType:
    type_size = SCALE_BYTES + 3 * size // 8
    group = size // HALVES

    def quantize(weights: Floats) -> Bytes:
        rows, columns = weights.shape
        groups = weights.reshape(-1, group)
        scale, minimum = group_parameters(groups)
        codes = nearest_codes(groups, scale, minimum)
        packed = pack_blocks(codes.reshape(-1, size), scale.reshape(-1, HALVES), minimum.reshape(-1, HALVES))
        return packed.reshape(rows, columns // size * type_size)

    def dequantize(data: Bytes) -> Floats:
        codes, scale, minimum = unpack_blocks(data.reshape(-1, type_size))
        groups = codes.reshape(-1, group).astype(np.float32)
        return (groups * scale.reshape(-1, 1) + minimum.reshape(-1, 1)).reshape(data.shape[0], -1)

    return QuantType(name, type_id, size, type_size, quantize, dequantize, fallback=fallback)


MBQ3S = _quant_type("MBQ3S", 122, 128, "MBQ3S_64")
MBQ3S_64 = _quant_type("MBQ3S_64", 123, 64, "Q4_0")
