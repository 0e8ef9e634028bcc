from __future__ import annotations

import numpy as np

from .constants import GGMLQuantizationType
from .quants import __Quant

# Bit layout: ggml/src/ggml-mbq-common.h. The same float32 operations in the same order as ggml-mbq.c.

F16_MAX = np.float32(65504)


class MBQ3(__Quant, qtype=GGMLQuantizationType.MBQ3):
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        low = blocks.min(axis=-1, keepdims=True) + np.float32(0)
        high = blocks.max(axis=-1, keepdims=True) + np.float32(0)
        head = np.concatenate([np.minimum(high / np.float32(7) - low / np.float32(7), F16_MAX), np.clip(low, -F16_MAX, F16_MAX)], axis=-1)
        head = head.astype("<f2")
        d, m = np.hsplit(head.astype(np.float32), 2)
        with np.errstate(divide="ignore"):
            inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
        q = np.rint(np.clip((blocks - m) * inverse, 0, 7)).astype(np.uint8).reshape((len(blocks), 4, cls.block_size // 4))

        ql = np.bitwise_or.reduce((q & 3) << np.array([0, 2, 4, 6], dtype=np.uint8).reshape((1, 4, 1)), axis=1)
        # high bit of [plane, half]: bit (2 * plane + 2) % 8 + half
        shifts = np.array([2, 3, 4, 5, 6, 7, 0, 1], dtype=np.uint8).reshape((1, 8, 1))
        qh = np.bitwise_or.reduce((q >> 2).reshape((len(blocks), 8, -1)) << shifts, axis=1)
        return np.concatenate([head.view(np.uint8), ql, qh], axis=-1)

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        head, ql, qh = np.hsplit(blocks, [4, 4 + cls.block_size // 4])
        d, m = np.hsplit(head.view("<f2").astype(np.float32), 2)
        low = ql[:, None, :] >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape((1, 4, 1)) & 3
        high = qh[:, None, :] >> np.array([2, 3, 4, 5, 6, 7, 0, 1], dtype=np.uint8).reshape((1, 8, 1)) & 1
        q = low.reshape((len(blocks), -1)) | high.reshape((len(blocks), -1)) << 2
        return q.astype(np.float32) * d + m


class MBQ3_64(MBQ3, qtype=GGMLQuantizationType.MBQ3_64):
    pass
