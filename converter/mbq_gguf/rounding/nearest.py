"""Round to nearest: each weight by itself, on the grid from its block's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.quant_type import Bytes, QuantType


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: ``data`` [rows, row_bytes], and ``weight`` [rows, columns] float32 as dequantised from the file."""

    data: Bytes
    weight: torch.Tensor


def round_nearest(weight: torch.Tensor, quant_type: QuantType) -> Rounded:
    """``weight`` [rows, columns] as ggml's own quantiser rounds it to ``quant_type``."""
    data = quant_type.quantize(weight.float().cpu().numpy())
    return Rounded(data, torch.from_numpy(quant_type.dequantize(data)).to(weight.device))


def nearest_values(weight: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """Only the rounded values [rows, columns] float32, for searches; stays on the device if the type has a plain rule."""
    grid = grid_of(quant_type)
    if grid is None or grid.fit is None:
        return round_nearest(weight, quant_type).weight
    groups = weight.float().reshape(-1, grid.group)
    scale, offset = grid.fit(groups)
    return (grid.codes(groups, scale, offset) * scale + offset).view_as(weight)
