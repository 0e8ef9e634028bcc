"""Packs the blocks of 32 weights of Q4_0 to Q8_0: one fp16 scale, in the _1 types one fp16 minimum, and codes (ggml-common.h).

Each function takes codes [n, 32] uint8 (0 is the type's lowest), and scale and minimum [n, 1] float32 that are exact in fp16, and returns
packed blocks [n, type_size]. Weights i and i + 16 share a byte.
"""

from __future__ import annotations

import numpy as np

from mbq_gguf.formats.quant_type import Bytes, Floats


def pack_q4_0(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """d, codes; w = d * (code - 8)."""
    return np.concatenate([f16_bytes(scale), _nibbles(codes)], axis=1)


def pack_q4_1(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """d, m, codes; w = d * code + m."""
    return np.concatenate([f16_bytes(scale), f16_bytes(minimum), _nibbles(codes)], axis=1)


def pack_q5_0(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """d, fifth bits, low four bits; w = d * (code - 16)."""
    return np.concatenate([f16_bytes(scale), _fifth_bits(codes), _nibbles(codes)], axis=1)


def pack_q5_1(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """d, m, fifth bits, low four bits; w = d * code + m."""
    return np.concatenate([f16_bytes(scale), f16_bytes(minimum), _fifth_bits(codes), _nibbles(codes)], axis=1)


def pack_q8_0(codes: Bytes, scale: Floats, minimum: Floats) -> Bytes:
    """d, codes as signed bytes; w = d * (code - 128)."""
    return np.concatenate([f16_bytes(scale), codes ^ np.uint8(128)], axis=1)


def f16_bytes(values: Floats) -> Bytes:
    """fp16-exact ``values`` [n, k] as little-endian bytes [n, 2 k]."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _nibbles(codes: Bytes) -> Bytes:
    low = codes & np.uint8(15)
    return low[:, :16] | low[:, 16:] << np.uint8(4)


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=1, bitorder="little")
