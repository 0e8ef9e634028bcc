from __future__ import annotations

import numpy as np

from .constants import GGMLQuantizationType
from .quants import __Quant

# Bit layout: ggml/src/ggml-mbq-common.h. The same float32 operations in the same order as ggml-mbq.c.

F16_MAX = np.float32(65504)
LOW_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8).reshape((1, 4, 1))
# high bit of [plane, half]: bit (2 * plane + 2) % 8 + half
HIGH_SHIFTS = np.array([2, 3, 4, 5, 6, 7, 0, 1], dtype=np.uint8).reshape((1, 8, 1))


def step(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.minimum(high / np.float32(7) - low / np.float32(7), F16_MAX)


def inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(d > 0, np.float32(1) / d, np.float32(0))


def pack(groups: np.ndarray, d: np.ndarray, m: np.ndarray, block_size: int) -> np.ndarray:
    q = np.rint(np.clip((groups - m) * inverse(d), 0, 7)).astype(np.uint8).reshape((-1, 4, block_size // 4))
    ql = np.bitwise_or.reduce((q & 3) << LOW_SHIFTS, axis=1)
    qh = np.bitwise_or.reduce((q >> 2).reshape((len(q), 8, -1)) << HIGH_SHIFTS, axis=1)
    return np.concatenate([ql, qh], axis=-1)


def unpack(blocks: np.ndarray, block_size: int) -> np.ndarray:
    ql, qh = np.hsplit(blocks[:, 4:], [block_size // 4])
    low = ql[:, None, :] >> LOW_SHIFTS & 3
    high = qh[:, None, :] >> HIGH_SHIFTS & 1
    return (low.reshape((len(blocks), -1)) | high.reshape((len(blocks), -1)) << 2).astype(np.float32)


class MBQ3(__Quant, qtype=GGMLQuantizationType.MBQ3):
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        low = blocks.min(axis=-1, keepdims=True) + np.float32(0)
        high = blocks.max(axis=-1, keepdims=True) + np.float32(0)
        pair = np.concatenate([step(low, high), np.clip(low, -F16_MAX, F16_MAX)], axis=-1).astype("<f2")
        d, m = np.hsplit(pair.astype(np.float32), 2)
        return np.concatenate([pair.view(np.uint8), pack(blocks, d, m, cls.block_size)], axis=-1)

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        d, m = np.hsplit(np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32), 2)
        return unpack(blocks, cls.block_size) * d + m


class MBQ3_64(MBQ3, qtype=GGMLQuantizationType.MBQ3_64):
    pass


def grids(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = (words >> 6 << 5).astype("<u2").view("<f2").astype(np.float32)
    return d, -(d * (words & 63).astype(np.float32)) / np.float32(8)


class MBQ3S(__Quant, qtype=GGMLQuantizationType.MBQ3S):
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        groups = blocks.reshape((-1, cls.block_size // 2))
        low = np.minimum(groups.min(axis=-1, keepdims=True), 0) + np.float32(0)
        high = np.maximum(groups.max(axis=-1, keepdims=True), 0) + np.float32(0)
        bits = step(low, high).astype("<f2").view("<u2")
        scale = np.minimum((bits + 15 + (bits >> 5 & 1)) >> 5, 0x3DF)  # ties to even
        with np.errstate(over="ignore"):
            zero = np.rint(np.clip(-low * np.float32(8) * inverse(grids(scale << 6)[0]), 0, 63))
        words = scale << 6 | zero.astype("<u2")
        codes = pack(groups, *grids(words), cls.block_size)
        return np.concatenate([words.reshape((-1, 2)).view(np.uint8), codes], axis=-1)

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        d, m = grids(np.ascontiguousarray(blocks[:, :4]).view("<u2"))
        q = unpack(blocks, cls.block_size).reshape((len(blocks), 2, -1))
        return (q * d[:, :, None] + m[:, :, None]).reshape((len(blocks), -1))


class MBQ3S_64(MBQ3S, qtype=GGMLQuantizationType.MBQ3S_64):
    pass
