"""Refit: the least-squares scales and offsets for fixed codes, from one small linear system per row.

A row w of weights with codes q is stored as v, with v[i] = scale[g] * q[i] + offset[g] for each weight i of group g. GPTQ's objective
(w - v) H (w - v)^T is a quadratic function of the row's scales and offsets, with its minimum at F H F^T p = F H w. Here p has all scales,
then all offsets; row g of F has group g's codes in the group's columns and zeros elsewhere, and the row of its offset has ones instead of
the codes. Alternating with descent.py, which changes the codes, this lowers the objective in every step.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch

from mbq_gguf.formats.grid import Grid, Pair, to_f16
from mbq_gguf.rounding import gptq
from mbq_gguf.rounding.gptq import row_blocks
from mbq_gguf.rounding.kernels import kernels_for
from mbq_gguf.rounding.recorded import Recorded, Tensors

SYSTEMS_BYTES = 1 << 29  # for the rows' systems, but at least LEAST_BLOCKS: solving them takes many small steps
LEAST_BLOCKS = 2
RIDGE = 1e-4  # share of each diagonal entry; if all codes of a group are equal, scale and offset are not separable


@torch.no_grad()
def refit(grid: Grid, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor) -> Pair:
    """Better ``scale`` and ``offset`` [rows, groups], representable in ``grid``, for ``codes`` and ``weight`` [rows, columns].

    A row keeps its old ones if rounding the solution makes its objective worse, or if a scale is not positive.
    """
    new_scale, new_offset = scale.clone(), offset.clone()
    at_once = _rows_at_once(scale)
    for start in range(0, weight.shape[0], at_once):
        rows = slice(start, start + at_once)
        new_scale[rows], new_offset[rows] = _refit_rows(grid, weight[rows].float(), codes[rows], scale[rows], offset[rows], hessian.float())
    return new_scale, new_offset


def _rows_at_once(scale: torch.Tensor) -> int:
    """The number of rows of ``scale`` [rows, groups] to refit at a time: whole blocks, in parts of equal size if possible."""
    blocks, system = len(row_blocks(len(scale))), 8 * (2 * scale.shape[1]) ** 2
    most = max(LEAST_BLOCKS, SYSTEMS_BYTES // system // gptq.ROWS_AT_ONCE)
    return math.ceil(blocks / math.ceil(blocks / most)) * gptq.ROWS_AT_ONCE


def _refit_rows(
    grid: Grid, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor
) -> Pair:
    rows, groups = scale.shape
    system = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64, device=scale.device)
    right = torch.empty(rows, 2 * groups, dtype=torch.float64, device=scale.device)
    for some in row_blocks(rows):
        _fill(system[some], right[some], weight[some], codes[some], scale[some], offset[some], hessian)
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.clamp(min=1e-12)
    diagonal += ridge
    lower, halfway, positive = _factored(system, right)
    new_scale, new_offset, left = _held_in_turn(grid, scale, offset, lower, halfway)
    change = _backwards(new_scale - scale, new_offset - offset).double()
    gain = (halfway.square() - left.square() + ridge * change.square()).sum(dim=1)  # the decrease of the objective
    better = positive & (gain > 0) & (new_scale > 0).all(dim=1) & new_offset.isfinite().all(dim=1)
    return torch.where(better[:, None], new_scale, scale), torch.where(better[:, None], new_offset, offset)


def _factored(system: torch.Tensor, right: torch.Tensor) -> Tensors:
    """L with L L^T = ``system`` [rows, numbers, numbers], from its lower triangle, the solution y of L y = ``right`` [rows, numbers], and a
    mask of the rows for which they exist. Overwrites ``system`` and ``right``."""
    fused = kernels_for(system)
    found = fused.factor(system, right) if fused and fused.factor else None
    if found:
        return found
    lower, info = torch.linalg.cholesky_ex(system)
    return lower, torch.linalg.solve_triangular(lower, right[..., None], upper=False)[..., 0], info == 0


def _backwards(of_scales: torch.Tensor, of_offsets: torch.Tensor) -> torch.Tensor:
    """Arrange values [rows, groups] of scales and offsets in the order of the systems [rows, 2 groups]: the last group first, and in each
    group the offset first, so that :func:`_held_in_turn`, which starts at the end, takes the first group's scale first."""
    return torch.stack([of_scales, of_offsets], 2).flatten(1).flip(1)


def _fill(
    system: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    hessian: torch.Tensor,
) -> None:
    """Write the lower triangle of F H F^T to ``system`` [rows, 2 groups, 2 groups] and F H (w - v) to ``right`` [rows, 2 groups], in the
    order of :func:`_backwards`: the solution is the change of scales and offsets."""
    rows, groups = scale.shape
    split = codes.view(rows, groups, -1)
    pull = ((weight - _values(codes, scale, offset)) @ hessian).view_as(split)  # from the current error
    right.copy_(_backwards((pull * split).sum(dim=2), pull.sum(dim=2)))
    fused = kernels_for(codes)
    if fused:
        fused.fill(system, codes, hessian, groups)
        return
    size = split.shape[2]
    tiles = hessian.view(groups, size, groups, size)
    ss = codes.new_empty(rows, groups, groups)
    for group in range(groups):
        here, later = slice(group * size, (group + 1) * size), slice(group * size, None)
        by_scale = (codes[:, here] @ hessian[here, later]).mul_(codes[:, later])  # the rows of F H for scales
        ss[:, group, group:] = by_scale.view(rows, groups - group, size).sum(dim=2)
        ss[:, group + 1 :, group] = ss[:, group, group + 1 :]
    so = torch.einsum("rgi,gih->rgh", split, tiles.sum(dim=3))
    placed = system.view(rows, groups, 2, groups, 2)
    placed[:, :, 1, :, 1] = ss.flip(1, 2)
    placed[:, :, 1, :, 0] = so.flip(1, 2)
    placed[:, :, 0, :, 1] = so.transpose(1, 2).flip(1, 2)
    placed[:, :, 0, :, 0] = tiles.sum(dim=(1, 3)).flip(0, 1)


def _held_in_turn(grid: Grid, scale: torch.Tensor, offset: torch.Tensor, lower: torch.Tensor, halfway: torch.Tensor) -> Tensors:
    """``scale`` and ``offset`` plus the solution x of L^T x = y, rounded to representable values, and the residual y - L^T x. L is
    ``lower`` [rows, 2 groups, 2 groups], y is ``halfway`` [rows, 2 groups].

    The numbers are rounded one after the other, and those not yet rounded compensate the error, like columns in GPTQ. For types with scale
    words (MBQ3S) this reaches 0.83 to 0.95 of the objective of rounding all at once; for fp16 numbers there is no difference. Back
    substitution, which solves L^T x = y from the last number to the first, does this naturally: the best value of a number follows from
    the rounded values after it. The objective falls by the square of y minus the square of the residual.
    """
    fused, left = kernels_for(lower), halfway.clone()
    if fused:
        return *fused.take_steps(left, lower, scale, offset, grid.held_pair is not None), left
    new_scale, new_offset, left = _recorded(grid)(left, lower, scale, offset)
    return new_scale, new_offset, left


@cache
def _recorded(grid: Grid) -> Recorded:
    return Recorded(partial(_take_steps, grid))


def _take_steps(grid: Grid, halfway: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Tensors:
    """``scale`` and ``offset`` [rows, groups] after the changes x of L^T x = y, rounded one after the other, and y - L^T x. L is ``lower``
    [rows, 2 groups, 2 groups], y is ``halfway`` [rows, 2 groups], which is overwritten."""
    new_scale, new_offset = torch.empty_like(scale), torch.empty_like(offset)
    for index in reversed(range(halfway.shape[1])):
        group, change = scale.shape[1] - 1 - index // 2, halfway[:, index] / lower[:, index, index]
        if index % 2 == 1:
            had = scale[:, group]
            new = new_scale[:, group] = grid.held((had + change).float(), offset[:, group])[0]
        else:
            had = offset[:, group]
            new = new_offset[:, group] = grid.held(new_scale[:, group], (had + change).float())[1]
        halfway[:, : index + 1] -= (new - had)[:, None] * lower[:, index, : index + 1]
    return new_scale, new_offset, halfway


@torch.no_grad()
def refit_row_scale(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Better ``scale`` [rows, 1], one fp16 number per row without offset: q H w / q H q for ``codes`` and ``weight`` [rows, columns].

    A row keeps its old scale if the new one, in fp16, does not improve its objective.
    """
    pull = torch.cat([codes[rows] @ hessian.float() for rows in row_blocks(len(codes))])
    curvature = (pull * codes).sum(dim=1, keepdim=True)
    slope = (pull * (weight.float() - codes * scale)).sum(dim=1, keepdim=True)
    found = to_f16(scale + torch.where(curvature > 0, slope / curvature, 0.0))
    step = found - scale
    return torch.where(step * (2 * slope - step * curvature) > 0, found, scale)


def _values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(size, 1) + offset.repeat_interleave(size, 1)
