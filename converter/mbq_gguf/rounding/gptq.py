"""GPTQ (arXiv 2210.17323) on the quant type's own grid: columns in order, each one's error made good by later ones.

With H = sum over tokens of w_t x_t x_t^T and U the upper Cholesky factor of (H + damping)^-1, column j is rounded to the grid, and its
error over U[j, j] times U[j, j + 1:] is taken from the columns that follow. A group's scale and offset are fitted when its first column is
reached, from the weights as they are then; so are a super-block's steps. On the reference VLM this gives K-quants 0.79 to 0.91 of the
objective that they have where all groups of a super-block are fitted at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mbq_gguf.formats.grid import Grid, reciprocal
from mbq_gguf.rounding.nearest import Rounded
from mbq_gguf.rounding.ranges import search_range, search_steps

# Groups [rows, group], what a squared error in each column costs [group], and steps [rows, 2], to scale and offset [rows, 1].
Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
COLUMNS_AT_ONCE = 128  # updates of later columns wait for this many (or for a group's size, if that is larger)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I in float64.

    Channels that no token excites (zero diagonal) get the mean diagonal, so they are rounded to nearest by themselves.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return matrix


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [columns, columns] float32 with damped(H)^-1 = U^T U, upper triangular; factored in float64."""
    return upper_factor(damped(hessian, damping)).float()


def upper_factor(matrix: torch.Tensor, check: bool = True) -> torch.Tensor:
    """Upper triangular U with matrix^-1 = U^T U for ``matrix`` [..., n, n]; without ``check`` anything where there is none."""
    # In reverse order of rows and columns L L^T becomes R R^T with R upper triangular, so that U = R^-1 without inverting the matrix.
    reverse = torch.linalg.cholesky_ex(matrix.flip(-2, -1), check_errors=check).L.flip(-2, -1)
    factor: torch.Tensor = torch.linalg.solve_triangular(reverse, torch.eye(matrix.shape[-1]).to(matrix), upper=True)
    return factor


@dataclass(frozen=True)
class Coded:
    """A rounded weight before packing: ``codes`` float32 [rows, columns], ``scale`` and ``offset`` float32 [rows, groups] as the file
    gives them, and the ``steps`` [rows, blocks, 2] that a K-quant keeps them in (0 elsewhere)."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    steps: torch.Tensor

    def split(self, rows: list[int]) -> list[Coded]:
        """The matrices of so many ``rows`` that lie one below the other in this one."""
        parts = (torch.split(part, rows) for part in (self.codes, self.scale, self.offset, self.steps))
        return [Coded(*part) for part in zip(*parts, strict=True)]

    def values(self, grid: Grid) -> torch.Tensor:
        """The weights [rows, columns] that the codes stand for."""
        scale, offset = (value.repeat_interleave(grid.group, 1) for value in (self.scale, self.offset))
        return self.codes * scale + offset

    def rounded(self, grid: Grid) -> Rounded:
        """Packed bytes and the values that they stand for."""
        return Rounded(grid.packed(self.codes, self.scale, self.offset, self.steps), self.values(grid))


def round_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None) -> Rounded:
    """``weight`` [rows, columns] rounded to ``grid`` with the factor U of :func:`inverse_factor`; ``fit`` replaces the grid's own."""
    return code_gptq(weight, factor, grid, fit).rounded(grid)


def own_fit(grid: Grid) -> Fit:
    """The type's plain rule where it has one, else the range search."""
    rule = grid.fit
    return partial(search_range, grid) if rule is None else lambda groups, costs, steps: rule(groups)


@torch.no_grad()
def code_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None) -> Coded:
    """GPTQ's codes for ``weight`` [rows, columns]; scales and offsets are ``fit``'s, or the grid's own without it."""
    fit = fit or own_fit(grid)
    diagonal = factor.diagonal().tolist()
    costs = factor.diagonal().square().reciprocal()
    work = weight.float().t().contiguous()  # [columns, rows]: a column's weights lie together
    columns, rows = work.shape
    codes = torch.empty(columns, rows, device=work.device)
    scales = torch.empty(columns // grid.group, rows, device=work.device)
    offsets = torch.empty_like(scales)
    steps = torch.zeros(columns // grid.block, rows, 2, device=work.device)
    whole_rows = grid.group == columns  # fitted once, before any update
    at_once = COLUMNS_AT_ONCE if whole_rows else max(COLUMNS_AT_ONCE // grid.group, 1) * grid.group
    for start in range(0, columns, at_once):
        end = min(start + at_once, columns)
        errors = torch.empty(end - start, rows, device=work.device)
        for column in range(start, end):
            block, group = column // grid.block, column // grid.group
            if column % grid.block == 0 and (grid.scale.stepped or grid.offset.stepped):
                here = slice(column, column + grid.block)
                steps[block] = search_steps(grid, work[here].t(), costs[here])
            if column % grid.group == 0:
                here = slice(column, column + grid.group)
                found = fit(work[here].t(), costs[here], steps[block])
                scales[group], offsets[group] = (part[:, 0] for part in found)
                scale, offset, inverse = scales[group], offsets[group], reciprocal(scales[group])
            code = grid.codes_by(work[column], inverse, offset)
            error = errors[column - start]
            torch.sub(work[column], (code * scale).add_(offset), out=error).div_(diagonal[column])
            codes[column] = code
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return Coded(codes.t().contiguous(), scales.t().contiguous(), offsets.t().contiguous(), steps.transpose(0, 1))


def objective(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """What GPTQ minimises: trace of (W - Q) H (W - Q)^T, the weighted squared change of the linear's output."""
    change = (weight - rounded).double()
    return float(((change @ hessian.double()) * change).sum())
