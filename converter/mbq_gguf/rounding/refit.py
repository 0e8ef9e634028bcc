"""Refit: the best scales and offsets for codes that stay as they are, by least squares, one small linear system a row.

A row w of weights with codes q is stored as v, v[i] = scale[g] * q[i] + offset[g] for each weight i of group g. GPTQ's objective
(w - v) H (w - v)^T is a quadratic function of the row's scales and offsets, least where F H F^T p = F H w: p are all scales, then all
offsets; row g of F holds group g's codes at the group's columns and zeros elsewhere, the row of its offset ones instead of the codes.
In turn with descent.py, which changes the codes, this lowers the objective step by step.
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

SYSTEMS_BYTES = 1 << 29  # of the rows' systems, at least those of LEAST_BLOCKS: their solution takes many small steps
LEAST_BLOCKS = 2
RIDGE = 1e-4  # of each diagonal entry: groups whose codes are all alike cannot tell scale from offset


@torch.no_grad()
def refit(grid: Grid, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor) -> Pair:
    """Better ``scale`` and ``offset`` [rows, groups] (as ``grid`` holds them) for ``codes`` and ``weight`` [rows, columns].

    A row keeps what it had where rounding the solution makes its objective worse, or a scale is not positive.
    """
    new_scale, new_offset = scale.clone(), offset.clone()
    at_once = _rows_at_once(scale)
    for start in range(0, weight.shape[0], at_once):
        rows = slice(start, start + at_once)
        new_scale[rows], new_offset[rows] = _refit_rows(grid, weight[rows].float(), codes[rows], scale[rows], offset[rows], hessian.float())
    return new_scale, new_offset


def _rows_at_once(scale: torch.Tensor) -> int:
    """How many rows of ``scale`` [rows, groups] are refitted at a time: whole blocks, in parts of one size where that can be."""
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
    gain = (halfway.square() - left.square() + ridge * change.square()).sum(dim=1)  # how much the objective falls
    better = positive & (gain > 0) & (new_scale > 0).all(dim=1) & new_offset.isfinite().all(dim=1)
    return torch.where(better[:, None], new_scale, scale), torch.where(better[:, None], new_offset, offset)


def _factored(system: torch.Tensor, right: torch.Tensor) -> Tensors:
    """L of ``system`` = L L^T [rows, numbers, numbers], of which the lower triangle is looked at, the solution y of L y = ``right``
    [rows, numbers], and which rows have them. ``system`` and ``right`` are given up."""
    fused = kernels_for(system)
    found = fused.factor(system, right) if fused and fused.factor else None
    if found:
        return found
    lower, info = torch.linalg.cholesky_ex(system)
    return lower, torch.linalg.solve_triangular(lower, right[..., None], upper=False)[..., 0], info == 0


def _backwards(of_scales: torch.Tensor, of_offsets: torch.Tensor) -> torch.Tensor:
    """Numbers [rows, groups] of scales and of offsets in the order of the systems [rows, 2 groups]: the last group first, and in each its
    offset first, so that what :func:`_held_in_turn` takes first comes last."""
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
    """The lower triangle of F H F^T into ``system`` [rows, 2 groups, 2 groups] and F H (w - v) into ``right`` [rows, 2 groups], in the
    order of :func:`_backwards`: the system is solved for changes."""
    rows, groups = scale.shape
    split = codes.view(rows, groups, -1)
    pull = ((weight - _values(codes, scale, offset)) @ hessian).view_as(split)  # of the error as it is
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
        by_scale = (codes[:, here] @ hessian[here, later]).mul_(codes[:, later])  # the rows of F H that belong to scales
        ss[:, group, group:] = by_scale.view(rows, groups - group, size).sum(dim=2)
        ss[:, group + 1 :, group] = ss[:, group, group + 1 :]
    so = torch.einsum("rgi,gih->rgh", split, tiles.sum(dim=3))
    placed = system.view(rows, groups, 2, groups, 2)
    placed[:, :, 1, :, 1] = ss.flip(1, 2)
    placed[:, :, 1, :, 0] = so.flip(1, 2)
    placed[:, :, 0, :, 1] = so.transpose(1, 2).flip(1, 2)
    placed[:, :, 0, :, 0] = tiles.sum(dim=(1, 3)).flip(0, 1)


def _held_in_turn(grid: Grid, scale: torch.Tensor, offset: torch.Tensor, lower: torch.Tensor, halfway: torch.Tensor) -> Tensors:
    """``scale`` and ``offset`` plus the solution x of L^T x = y, each as the file can hold it, and what is left, y - L^T x: L is ``lower``
    [rows, 2 groups, 2 groups], y ``halfway`` [rows, 2 groups].

    They are rounded one after the other, and the numbers not yet rounded move to compensate the error, as columns do in GPTQ. Where a
    group has a scale word (MBQ3S) this gives 0.83 to 0.95 of the objective that rounding all at once gives; with fp16 numbers the same.
    The second half of solving a system, L^T x = y from the last number to the first, is where that is done: the best value of a number
    follows from those after it, whatever they were rounded to. The objective falls by y^2 less what is left squared.
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
    """``scale`` and ``offset`` [rows, groups] after the changes x of L^T x = y, rounded in turn, and y - L^T x: L is ``lower``
    [rows, 2 groups, 2 groups], y is ``halfway`` [rows, 2 groups], which is changed."""
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
    """Better ``scale`` [rows, 1], one fp16 number a row and no offset: q H w / q H q for ``codes`` and ``weight`` [rows, columns].

    A row keeps what it had where fp16 makes its objective no better.
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
