"""Range search: a block's scale and offset where the weights' squared error, each weight by what its error costs, is least.

First a few shrunken ranges, both ends alone (OCTAV, AWQ's clipping, with two ends), then codes and a weighted least-squares line through
them take turns. Under GPTQ an error in column j costs 1 / U[j, j] ** 2, since later columns make good the rest: with these costs GPTQ's
objective on the reference VLM is 0.70 of plain GPTQ's, with equal costs 0.82, with both ends shrunken alike 0.85 (equal) and 0.77.
"""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import Grid, to_f16

SHRINKS = (1.0, 0.9, 0.8, 0.7)
TURNS = 3  # of codes and least squares; 7 x 7 or 17 x 17 shrinks instead of 4 x 4 give no more


def search_range(grid: Grid, blocks: torch.Tensor, costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [rows, 1] for ``blocks`` [rows, block] with the squared error of column j weighted by ``costs`` [block]."""
    low, high = torch.aminmax(blocks, dim=1, keepdim=True)
    scale, offset = grid.fit(blocks)
    least = _error(grid, blocks, costs, scale, offset)
    tried = [_between(grid, low * a, high * b) for a in SHRINKS for b in SHRINKS if (a, b) != (1.0, 1.0)]
    for candidate in tried:
        scale, offset, least = _better(grid, blocks, costs, candidate, (scale, offset, least))
    for _ in range(TURNS):
        candidate = _line(blocks, grid.codes(blocks, scale, offset), costs)
        scale, offset, least = _better(grid, blocks, costs, candidate, (scale, offset, least))
    return scale, offset


def _between(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = to_f16((high - low) / (grid.high - grid.low))
    return scale, to_f16(low - grid.low * scale)


def _line(blocks: torch.Tensor, codes: torch.Tensor, costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The line w = scale * code + offset of least weighted squares; scale 0 where all codes of a block are alike."""
    share = costs / costs.sum()
    mean_code, mean = codes @ share[:, None], blocks @ share[:, None]
    spread = (codes - mean_code).square() @ share[:, None]
    slope = ((codes - mean_code) * (blocks - mean)) @ share[:, None] / spread.clamp(min=1e-12)
    scale = to_f16(slope)
    return scale, to_f16(mean - scale * mean_code)


def _better(
    grid: Grid,
    blocks: torch.Tensor,
    costs: torch.Tensor,
    candidate: tuple[torch.Tensor, torch.Tensor],
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row by row the candidate where it is better (and its scale positive), else the best so far."""
    error = _error(grid, blocks, costs, *candidate)
    better = (error < best[2]) & (candidate[0] > 0)
    scale, offset = (torch.where(better, new, old) for new, old in zip(candidate, best[:2], strict=True))
    return scale, offset, torch.where(better, error, best[2])


def _error(grid: Grid, blocks: torch.Tensor, costs: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (grid.codes(blocks, scale, offset) * scale + offset - blocks).square() @ costs[:, None]
