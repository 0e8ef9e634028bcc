"""GPTQ (arXiv 2210.17323) on a container's own grid: columns in order, each one's error made good by later ones.

With H = sum over tokens of w_t x_t x_t^T and U the upper Cholesky factor of (H + damping)^-1, column j is rounded to the grid, and its
error over U[j, j] times U[j, j + 1:] is taken from the columns that follow. A block's scale and offset are fitted when its first column is
reached, from the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mbq_gguf.formats.grid import Grid
from mbq_gguf.rounding.nearest import Rounded

# Blocks [rows, block] and what a squared error in each column costs [block] to scale and offset [rows, 1].
Fit = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
COLUMNS_AT_ONCE = 128  # updates of later columns wait for this many (or for a block's size, if that is larger)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [columns, columns] float32 with (H + damping * mean(diag H) * I)^-1 = U^T U, upper triangular; factored in float64.

    Channels that no token excites (zero diagonal) get the mean diagonal, so they are rounded to nearest by themselves.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


@dataclass(frozen=True)
class Coded:
    """A rounded weight before packing: ``codes`` float32 [rows, columns], ``scale`` and ``offset`` float32 (fp16 values) [rows, blocks]."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def rounded(self, grid: Grid) -> Rounded:
        """Packed bytes and the values that they stand for."""
        scale, offset = (value.repeat_interleave(grid.block, 1) for value in (self.scale, self.offset))
        data = grid.pack((self.codes - grid.low).to(torch.uint8), self.scale, self.offset)
        return Rounded(data, self.codes * scale + offset)


def round_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None) -> Rounded:
    """``weight`` [rows, columns] rounded to ``grid`` with the factor U of :func:`inverse_factor`; ``fit`` replaces the grid's own."""
    return code_gptq(weight, factor, grid, fit).rounded(grid)


@torch.no_grad()
def code_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None, held: Coded | None = None) -> Coded:
    """GPTQ's codes for ``weight`` [rows, columns]; scales and offsets are ``fit``'s, the grid's own without it, or those of ``held``."""
    fit = fit or (lambda blocks, costs: grid.fit(blocks))
    costs = factor.diagonal().square().reciprocal()
    work = weight.float().t().contiguous()  # [columns, rows]: a column's weights lie together
    columns, rows = work.shape
    codes = torch.empty(columns, rows, device=work.device)
    if held is None:
        scales = torch.empty(columns // grid.block, rows, device=work.device)
        offsets = torch.empty_like(scales)
    else:
        scales, offsets = held.scale.t().contiguous(), held.offset.t().contiguous()
    step = max(COLUMNS_AT_ONCE // grid.block, 1) * grid.block
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty(end - start, rows, device=work.device)
        for column in range(start, end):
            block = column // grid.block
            if column % grid.block == 0 and held is None:
                columns_of = slice(column, column + grid.block)
                scale, offset = fit(work[columns_of].t(), costs[columns_of])
                scales[block], offsets[block] = scale[:, 0], offset[:, 0]
            code = grid.codes(work[column], scales[block], offsets[block])
            codes[column] = code
            error = (work[column] - (code * scales[block] + offsets[block])) / factor[column, column]
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return Coded(codes.t().contiguous(), scales.t().contiguous(), offsets.t().contiguous())


def objective(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """What GPTQ minimises: trace of (W - Q) H (W - Q)^T, the weighted squared change of the linear's output."""
    change = (weight - rounded).double()
    return float(((change @ hessian.double()) * change).sum())
