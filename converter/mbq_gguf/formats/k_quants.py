"""Packs the K-quants' super-blocks of 256 weights: fp16 steps, integer group scales and minima, and codes (ggml-common.h).

Each function takes codes [n, 256] uint8 (0 is the type's lowest), integer scales and minima of the groups [n, groups] int64, and steps [n,
1] float32 that are exact in fp16, and returns packed super-blocks [n, type_size]. A weight is (step * scale) * code, in Q2_K, Q4_K and Q5_K
minus (minimum step * minimum). All these products are exact in float32: at most 11 + 8 + 5 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mbq_gguf.formats.legacy import f16_bytes
from mbq_gguf.formats.quant_type import Bytes, Floats

Multiples = npt.NDArray[np.int64]


def pack_q2_k(codes: Bytes, scale: Multiples, minimum: Multiples, step: Floats, minimum_step: Floats) -> Bytes:
    """16 bytes of scale (0 to 15) and minimum (0 to 15), 64 of codes, d, dmin; groups of 16."""
    return np.concatenate([_bytes(scale | minimum << 4), _low_pairs(codes), f16_bytes(step), f16_bytes(minimum_step)], axis=1)


def pack_q3_k(codes: Bytes, scale: Multiples, minimum: Multiples, step: Floats, minimum_step: Floats) -> Bytes:
    """32 bytes of high bits, 64 of low ones, 12 of scales (-32 to 31), d; groups of 16; w = d * scale * (code - 4)."""
    high = _bytes(_gathered(codes.reshape(-1, 8, 32) >> 2, 1, axis=1))
    lifted = scale + 32
    low = lifted[:, :8] & 15 | (lifted[:, 8:] & 15) << 4
    top = _gathered((lifted >> 4).reshape(-1, 4, 4), 2, axis=1)
    return np.concatenate([high, _low_pairs(codes), _bytes(low), _bytes(top), f16_bytes(step)], axis=1)


def pack_q4_k(codes: Bytes, scale: Multiples, minimum: Multiples, step: Floats, minimum_step: Floats) -> Bytes:
    """d, dmin, 12 bytes of scales and minima (0 to 63), 128 of codes; groups of 32."""
    head = [f16_bytes(step), f16_bytes(minimum_step), _six_bits(scale, minimum)]
    return np.concatenate([*head, _nibbles(codes)], axis=1)


def pack_q5_k(codes: Bytes, scale: Multiples, minimum: Multiples, step: Floats, minimum_step: Floats) -> Bytes:
    """d, dmin, 12 bytes of scales and minima (0 to 63), 32 of fifth bits, 128 of low four bits; groups of 32."""
    head = [f16_bytes(step), f16_bytes(minimum_step), _six_bits(scale, minimum)]
    fifth = _bytes(_gathered(codes.reshape(-1, 8, 32) >> 4, 1, axis=1))
    return np.concatenate([*head, fifth, _nibbles(codes)], axis=1)


def pack_q6_k(codes: Bytes, scale: Multiples, minimum: Multiples, step: Floats, minimum_step: Floats) -> Bytes:
    """128 bytes of low four bits, 64 of high two, 16 of scales (-128 to 127), d; groups of 16; w = d * scale * (code - 32)."""
    quarters = codes.reshape(-1, 2, 4, 32)
    nibbles = quarters & np.uint8(15)
    low = (nibbles[:, :, :2] | nibbles[:, :, 2:] << np.uint8(4)).reshape(-1, 128)
    high = _bytes(_gathered(quarters >> 4, 2, axis=2)).reshape(-1, 64)
    return np.concatenate([low, high, _bytes(scale & 255), f16_bytes(step)], axis=1)


def _gathered(parts: Any, bits: int, axis: int) -> Any:
    """Combine the parts along ``axis``, ``bits`` wide each, in one number; the first has the lowest bits."""
    shifts = np.arange(parts.shape[axis]) * bits
    return (parts.astype(np.int64) << np.expand_dims(shifts, tuple(range(1, parts.ndim - axis)))).sum(axis)


def _bytes(values: Multiples) -> Bytes:
    return values.astype(np.uint8)


def _low_pairs(codes: Bytes) -> Bytes:
    """The two low bits of four weights per byte, which are 32 weights apart, for each half of the super-block."""
    return _bytes(_gathered(codes.reshape(-1, 2, 4, 32) & 3, 2, axis=2)).reshape(-1, 64)


def _nibbles(codes: Bytes) -> Bytes:
    """Two weights per byte, which are 32 weights apart."""
    pairs = (codes & np.uint8(15)).reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << np.uint8(4)).reshape(-1, 128)


def _six_bits(scale: Multiples, minimum: Multiples) -> Bytes:
    """Eight scales and eight minima of six bits. The first four of each have a byte, whose top two bits are those of the last four."""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = minimum[:, :4] | minimum[:, 4:] >> 4 << 6
    third = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
    return _bytes(np.concatenate([first, second, third], axis=1))
