"""Coordinate descent over the codes, which revisits columns that GPTQ has already rounded.

With fixed scales and offsets, and G = (W - Q) H for weights W and their rounded values Q, the best code of column j, with all other codes
fixed, is code_j + G_j / (H[j, j] scale_j), rounded. No step can increase GPTQ's objective (the greedy updates of QuIP, arXiv 2307.13304).
On the reference VLM, one pass between two refits reaches 0.65 to 0.86 of the objective that a second pass of GPTQ in its place gives, and
nearly the same ratio on held-out samples.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from mbq_gguf.formats.grid import Grid, reciprocal
from mbq_gguf.rounding.gptq import COLUMNS_AT_ONCE, Coded, carry, row_blocks
from mbq_gguf.rounding.inverse import damped
from mbq_gguf.rounding.kernels import kernels_for
from mbq_gguf.rounding.recorded import Recorded, Tensors


@torch.no_grad()
def descend(grid: Grid, weight: torch.Tensor, coded: Coded, hessian: torch.Tensor, damping: float) -> Coded:
    """Re-optimise the codes of ``coded``, one column after the other, for ``weight`` [rows, columns]; scales and offsets are fixed."""
    matrix = damped(hessian, damping, torch.float32)
    scales = coded.scale.repeat_interleave(grid.group, 1).t().contiguous()  # [columns, rows]: a column is contiguous
    codes = coded.codes.t().contiguous()
    change_of = (weight - coded.values(grid)).t()
    slope = torch.cat([matrix @ change_of[:, rows] for rows in row_blocks(len(weight))], 1)  # G, updated after every change
    fused, descend_columns = kernels_for(codes), _recorded(grid)
    for start in range(0, len(codes), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(codes))
        here = slice(start, end)
        if fused:
            changes = fused.descend_columns(slope[here], matrix[here, here], scales[here], codes[here], grid.low, grid.high)
        else:
            codes[here], changes = descend_columns(slope[here], matrix[here, here], scales[here], codes[here])
        carry(slope[end:], matrix[end:, here], changes)
    return Coded(codes.t().contiguous(), coded.scale, coded.offset, coded.steps)


@cache
def _recorded(grid: Grid) -> Recorded:
    return Recorded(partial(_descend_columns, grid))


def _descend_columns(grid: Grid, slope: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> Tensors:
    """Better codes and the changes of the weights, both [columns, rows] like all arguments but ``matrix``; updates ``slope``."""
    better, changes, inverses = torch.empty_like(codes), torch.empty_like(codes), reciprocal(scales)
    for column, own in enumerate(matrix.diagonal().unbind()):
        found = torch.mul(slope[column], inverses[column], out=better[column]).div_(own).add_(codes[column]).round_()
        change = torch.sub(found.clamp_(grid.low, grid.high), codes[column], out=changes[column]).mul_(scales[column])
        slope[column + 1 :].addr_(matrix[column + 1 :, column], change, alpha=-1)
    return better, changes
