"""GPTQ (arXiv 2210.17323) on a container's own grid: columns in order, each one's error made good by later ones.

With H = sum over tokens of w_t x_t x_t^T and U the upper Cholesky factor of (H + damping)^-1, column j is rounded to the grid, and its error
over U[j, j] times U[j, j + 1:] is taken from the columns that follow. A block's scale and offset are fitted when its first column is
reached, from the weights as they are then.
"""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import Grid
from mbq_gguf.rounding.nearest import Rounded

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


@torch.no_grad()
def round_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid) -> Rounded:
    """``weight`` [rows, columns] rounded to ``grid`` with the factor U of :func:`inverse_factor`."""
    work = weight.float().t().contiguous()  # [columns, rows]: a column's weights lie together
    columns, rows = work.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
    scales = torch.empty(columns // grid.block, rows, device=work.device)
    offsets = torch.empty_like(scales)
    step = max(COLUMNS_AT_ONCE // grid.block, 1) * grid.block
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty(end - start, rows, device=work.device)
        for column in range(start, end):
            if column % grid.block == 0:
                scale, offset = grid.fit(work[column : column + grid.block].t())
                scale, offset = scale[:, 0], offset[:, 0]
                scales[column // grid.block], offsets[column // grid.block] = scale, offset
            code = grid.codes(work[column], scale, offset)
            codes[column] = (code - grid.low).to(torch.uint8)
            rounded = code * scale + offset
            error = (work[column] - rounded) / factor[column, column]
            work[column] = rounded
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    data = grid.pack(codes.t().contiguous(), scales.t().contiguous(), offsets.t().contiguous())
    return Rounded(data, work.t().contiguous())


def objective(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """What GPTQ minimises: trace of (W - Q) H (W - Q)^T, the weighted squared change of the linear's output."""
    change = (weight - rounded).double()
    return float(((change @ hessian.double()) * change).sum())
