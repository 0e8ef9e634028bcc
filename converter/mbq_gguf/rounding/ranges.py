"""Range search: the scale and offset of a group with the least squared error, each weight's error weighted by what it costs.

First a few shrunk ranges, each end by itself (OCTAV, AWQ's clipping, with two ends), then codes and a weighted least-squares line through
them take turns. Under GPTQ an error in column j costs 1 / U[j, j] ** 2, since later columns make good the rest: with these costs GPTQ's
objective on the reference VLM is 0.70 of plain GPTQ's, with equal costs 0.82, with both ends shrunk alike 0.85 (equal) and 0.77.
The same search serves every grid; in the stock types it alone (no GPTQ, importance matrix as costs) comes within 0.92 to 1.13 of ggml's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from mbq_gguf.formats.grid import Grid, Pair
from mbq_gguf.rounding.kernels import kernels_for

# Groups [rows, group], what a squared error in each column costs [group], and steps [rows, 2], to scale and offset [rows, 1].
Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]
TRIMS = (0.0, 0.7, 1.4, 2.1)  # the code steps by which a range is shrunk at either end
LARGEST_GROUP = 256
ROW_SHARES = tuple(0.95**step for step in range(24))  # of the range where a grid serves more weights: outliers are rarer and further out
TURNS = 3  # of codes and least squares; more turns, 7 x 7 or 17 x 17 shrunk ranges instead of 4 x 4 give MBQ3 no more


def search_range(grid: Grid, groups: torch.Tensor, costs: torch.Tensor, steps: torch.Tensor | None = None) -> Pair:
    """Scale and offset [..., 1] for ``groups`` [..., group] with squared errors weighted by ``costs`` [group] or [..., group].

    They are values that a block with ``steps`` [..., 2] can hold; without steps, K-quants' are any real numbers.
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
    """:func:`search_range` for ``grid``; always the same object, by which recorded loops are found again."""
    return partial(search_range, grid)


def search_steps(grid: Grid, blocks: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Steps [rows, 2] of scale and offset for ``blocks`` [rows, block]: what the best scales and offsets of the groups need."""
    scale, offset = search_range(grid, blocks.reshape(len(blocks), -1, grid.group), costs.view(-1, grid.group))
    return torch.stack([grid.scale.step(scale[..., 0]), grid.offset.step(offset[..., 0])], dim=1)


def shares_of(grid: Grid) -> tuple[float, ...]:
    """What is left of the plain range at either end."""
    return ROW_SHARES if grid.group > LARGEST_GROUP else tuple(1 - trim / (grid.high - grid.low) for trim in TRIMS)


def _ranges(grid: Grid, groups: torch.Tensor, steps: torch.Tensor | None) -> Iterator[Pair]:
    """The plain range first, then shrunken ones."""
    if grid.fit is not None:
        yield grid.fit(groups)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    shares = shares_of(grid)
    if grid.low < 0:  # no offset: the extreme weight gets the lowest code, or the one opposite, which may be out of reach
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
    """The line w = scale * code + offset of least weighted squares; its offset rounded first, then the best scale beside that."""
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
    """Group by group the candidate where it is better (and its scale positive, unless codes have signs), else the best so far."""
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
