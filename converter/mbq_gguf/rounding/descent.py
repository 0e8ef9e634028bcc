"""Coordinate descent over the codes: GPTQ never goes back to a column, this does.

With scales and offsets held and G = (W - Q) H for weights W and their rounded values Q, the best code of column j, all others held, is
code_j + G_j / (H[j, j] scale_j), rounded. No step can raise GPTQ's objective (the greedy updates of QuIP, arXiv 2307.13304). On the
reference VLM one pass between two refits lowers the objective to 0.65 to 0.86 of what a second pass of GPTQ in its place gives, and to
nearly the same share on samples that were not seen.
"""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import Grid, reciprocal
from mbq_gguf.rounding.gptq import COLUMNS_AT_ONCE, Coded, damped


@torch.no_grad()
def descend(grid: Grid, weight: torch.Tensor, coded: Coded, hessian: torch.Tensor, damping: float) -> Coded:
    """``coded`` with every column's codes chosen anew, one column after the other, for ``weight`` [rows, columns]; parameters stay."""
    matrix = damped(hessian, damping).float()
    diagonal = matrix.diagonal().tolist()
    scales = coded.scale.repeat_interleave(grid.group, 1).t().contiguous()  # [columns, rows]: a column's lie together
    inverses = reciprocal(scales)
    codes = coded.codes.t().contiguous()
    slope = matrix @ (weight - coded.values(grid)).t()  # G, with every change so far taken off
    for start in range(0, len(codes), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(codes))
        changes = torch.empty(end - start, codes.shape[1], device=codes.device)
        for column in range(start, end):
            better = (codes[column] + slope[column] * inverses[column] / diagonal[column]).round_().clamp_(grid.low, grid.high)
            change = changes[column - start]
            torch.sub(better, codes[column], out=change).mul_(scales[column])
            codes[column] = better
            slope[column + 1 : end].addr_(matrix[column + 1 : end, column], change, alpha=-1)
        slope[end:].addmm_(matrix[end:, start:end], changes, alpha=-1)
    return Coded(codes.t().contiguous(), coded.scale, coded.offset, coded.steps)
