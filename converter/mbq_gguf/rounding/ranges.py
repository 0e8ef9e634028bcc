"""Range search: a block's scale and offset from a shrunken range, where the weights' own squared error is least (OCTAV, AWQ's clipping)."""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import Grid

SHRINKS = tuple(1 - step / 40 for step in range(21))  # 1.0, 0.975, ..., 0.5


def search_range(grid: Grid, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [..., 1] for ``blocks`` [..., block]: of all :data:`SHRINKS` of both ends the one with the least squared error."""
    scale, offset = grid.fit(blocks)
    least = _error(grid, blocks, scale, offset)
    for shrink in SHRINKS[1:]:
        tried_scale, tried_offset = grid.fit(blocks * shrink)
        error = _error(grid, blocks, tried_scale, tried_offset)
        better = error < least
        scale, offset = torch.where(better, tried_scale, scale), torch.where(better, tried_offset, offset)
        least = torch.where(better, error, least)
    return scale, offset


def _error(grid: Grid, blocks: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (grid.codes(blocks, scale, offset) * scale + offset - blocks).square().sum(dim=-1, keepdim=True)
