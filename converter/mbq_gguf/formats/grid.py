"""The containers whose weights lie on a line, w = scale * code + offset a block, in PyTorch: for searches and column-by-column rounding.

Scale and offset are what the file stores (rounded to fp16), so a weight rounded here is the weight that ggml reads back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mbq_gguf.formats import mbq3
from mbq_gguf.formats.container import Bytes, Container

F16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """``block`` weights share a scale and an offset; codes run from ``low`` to ``high``.

    ``fit`` takes blocks [..., block] and gives scale and offset [..., 1]. ``pack`` takes codes [rows, columns] (uint8, counted from
    ``low``) with scale and offset [rows, columns / block] and gives bytes [rows, row_bytes].
    """

    block: int
    low: int
    high: int
    fit: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Bytes]

    def codes(self, weights: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The nearest codes as float32; ties go to the even one. Where the scale is 0 the code is as near 0 as the range allows."""
        inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
        return ((weights - offset) * inverse).clamp(self.low, self.high).round_()

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights`` [rows, columns] float32 after rounding to the grid that their own range gives."""
        blocks = weights.reshape(-1, self.block)
        scale, offset = self.fit(blocks)
        return (self.codes(blocks, scale, offset) * scale + offset).view_as(weights)


def to_f16(values: torch.Tensor) -> torch.Tensor:
    """``values`` as fp16 stores them, in float32; beyond its range its largest number."""
    return values.clamp(-F16_MAX, F16_MAX).half().float()


def grid_of(container: Container) -> Grid | None:
    """The grid of ``container``, or None where its weights do not lie on one line a block (K-quants, IQ types, floats)."""
    if container.name in ("MBQ3", "MBQ3_64"):
        size = container.block_size
        return Grid(size, 0, mbq3.LEVELS, lambda blocks: _fit_range(blocks, mbq3.LEVELS), lambda c, s, o: _pack_mbq3(c, s, o, size))
    return None


def _fit_range(blocks: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum by the range of each block: mbq3.block_parameters, operation by operation."""
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    low, high = low + 0.0, high + 0.0  # -0 becomes +0, as in the container
    # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number, which rounds differently.
    divisor = torch.tensor(float(levels), device=blocks.device)
    return to_f16(high / divisor - low / divisor), to_f16(low)


def _pack_mbq3(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, size: int) -> Bytes:
    blocks = codes.reshape(-1, size).cpu().numpy()
    packed = mbq3.pack_blocks(blocks, scale.reshape(-1, 1).cpu().numpy(), offset.reshape(-1, 1).cpu().numpy())
    return packed.reshape(codes.shape[0], -1)
