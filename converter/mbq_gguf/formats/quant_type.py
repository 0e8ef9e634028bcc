"""QuantType describes a ggml block format: weights and bytes per block, quantisation and dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QuantType:
    """One ggml block type.

    ``quantize`` maps float32 weights [rows, columns] to bytes [rows, row_bytes] exactly as ggml's ``from_float_ref`` does (nearest
    rounding, no calibration); ``dequantize`` is ggml's ``to_float``.
    """

    name: str
    type_id: int  # ggml_type
    block_size: int  # weights per block
    type_size: int  # bytes per block
    quantize: Callable[[Floats], Bytes]
    dequantize: Callable[[Bytes], Floats]
    fallback: str | None = None  # the type to try where a row is not a multiple of block_size

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for one weight, scales included."""
        return 8.0 * self.type_size / self.block_size

    def fits(self, columns: int) -> bool:
        """Whether rows of ``columns`` weights can be stored: ggml keeps no part of a block."""
        return columns % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes that a row of ``columns`` weights takes."""
        return columns // self.block_size * self.type_size
