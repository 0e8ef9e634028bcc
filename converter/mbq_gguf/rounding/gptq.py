"""GPTQ (arXiv 2210.17323) on the quant type's own grid: rounds columns in order and compensates each one's error in later columns.

With H = sum over tokens of w_t x_t x_t^T and U the upper Cholesky factor of (H + damping)^-1, column j is rounded to the grid, and its
error / U[j, j] times U[j, j + 1:] is subtracted from the following columns. Scale and offset of a group are fitted when its first column
is reached, to the weights as updated by then; likewise the steps of a super-block. On the reference VLM, K-quants then reach 0.79 to 0.91
of the objective that they have if all groups of a super-block are fitted at its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch

from mbq_gguf.formats.grid import Grid, reciprocal
from mbq_gguf.rounding.kernels import kernels_for
from mbq_gguf.rounding.kernels.group import Group
from mbq_gguf.rounding.nearest import Rounded
from mbq_gguf.rounding.ranges import Fit, search_steps, searched
from mbq_gguf.rounding.recorded import Recorded, Tensors

COLUMNS_AT_ONCE = 128  # later columns are updated after this many (or after a group, if that is larger)
# Rows per matrix product. Libraries choose the order of sums by the shape; with blocks of fixed size, a row's bits do not depend on which
# other blocks are rounded with it, so that several processes can share a matrix.
ROWS_AT_ONCE = 256


def row_blocks(rows: int) -> list[slice]:
    """Split ``rows`` into blocks of ROWS_AT_ONCE."""
    return [slice(start, min(start + ROWS_AT_ONCE, rows)) for start in range(0, rows, ROWS_AT_ONCE)]


def carry(later: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
    """Subtract ``factor`` [columns, n] times ``errors`` [n, rows] from ``later`` [columns, rows], in place."""
    fused = kernels_for(later)
    if fused and fused.carry:
        fused.carry(later, factor, errors)
        return
    for some in row_blocks(later.shape[1]):
        later[:, some].addmm_(factor, errors[:, some], alpha=-1)


@dataclass(frozen=True)
class Coded:
    """A rounded weight before packing: ``codes`` float32 or int8 [rows, columns], ``scale`` and ``offset`` float32 [rows, groups] as
    stored in the file, and the ``steps`` [rows, blocks, 2] of K-quants (0 for other types)."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    steps: torch.Tensor

    def split(self, rows: list[int]) -> list[Coded]:
        """Split into matrices with the given numbers of ``rows``."""
        parts = (torch.split(part, rows) for part in (self.codes, self.scale, self.offset, self.steps))
        return [Coded(*part) for part in zip(*parts, strict=True)]

    def values(self, grid: Grid) -> torch.Tensor:
        """The dequantised weights [rows, columns]."""
        scale, offset = (value.repeat_interleave(grid.group, 1) for value in (self.scale, self.offset))
        return self.codes.float() * scale + offset

    def rounded(self, grid: Grid) -> Rounded:
        """Packed bytes and dequantised values."""
        return Rounded(grid.packed(self.codes.float(), self.scale, self.offset, self.steps).cpu().numpy(), self.values(grid))


def round_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None) -> Rounded:
    """``weight`` [rows, columns] rounded to ``grid`` with the factor U of inverse.py; ``fit`` replaces the grid's own."""
    return code_gptq(weight, factor, grid, fit).rounded(grid)


@cache
def own_fit(grid: Grid) -> Fit:
    """The type's plain rule, if it has one, else the range search."""
    rule = grid.fit
    return searched(grid) if rule is None else lambda groups, costs, steps: rule(groups)


@torch.no_grad()
def code_gptq(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, fit: Fit | None = None) -> Coded:
    """GPTQ's codes for ``weight`` [rows, columns]; scales and offsets come from ``fit``, or from the grid's own rule."""
    fit = fit or own_fit(grid)
    costs = factor.diagonal().square().reciprocal()
    work = weight.float().t().contiguous()  # [columns, rows]: a column's weights are contiguous
    columns, rows = work.shape
    codes = torch.empty(columns, rows, device=work.device)
    steps = torch.zeros(columns // grid.block, rows, 2, device=work.device)
    lines: list[torch.Tensor] = []  # [2, groups, rows] each
    if grid.group == columns:  # whole rows, fitted once, before any update
        lines.append(_line(fit, work, costs, steps[0]))
    at_once = COLUMNS_AT_ONCE if lines else max(COLUMNS_AT_ONCE // grid.group, 1) * grid.group
    round_columns = _recorded(grid, fit)
    for start in range(0, columns, at_once):
        block, end = start // grid.block, min(start + at_once, columns)
        here, later = slice(start, end), slice(end, columns)
        if start % grid.block == 0 and (grid.scale.stepped or grid.offset.stepped):
            whole = slice(start, start + grid.block)
            steps[block] = search_steps(grid, work[whole].t(), costs[whole])
        given = lines if grid.group == columns else []
        codes[here], errors, line = round_columns(work[here], factor[here, here], steps[block], *given)
        if not given:
            lines.append(line.clone())
        carry(work[later], factor[here, later].t(), errors)
    scales, offsets = torch.cat(lines, dim=1)
    return Coded(codes.t().contiguous(), scales.t().contiguous(), offsets.t().contiguous(), steps.transpose(0, 1))


@cache
def _recorded(grid: Grid, fit: Fit) -> Recorded:
    return Recorded(partial(_round_columns, grid, fit))


def _round_columns(
    grid: Grid, fit: Fit, work: torch.Tensor, factor: torch.Tensor, steps: torch.Tensor, given: torch.Tensor | None = None
) -> Tensors:
    """Codes, errors [columns, rows] and scales with offsets [2, groups, rows] for ``work`` [columns, rows], which is changed. ``factor`` is
    the part of U for these columns; ``given`` are scale and offset [2, 1, rows] of types with one group per row."""
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    costs = factor.diagonal().square().reciprocal()
    fused = kernels_for(work)
    lines = []
    for start in range(0, len(work), grid.group):
        columns = range(len(work))[start : start + grid.group]
        lines.append(_line(fit, work[start : columns.stop], costs[start : columns.stop], steps) if given is None else given)
        group = Group(work, factor, lines[-1], codes, errors, columns, grid.low, grid.high)
        if fused:
            fused.round_group(group)
        else:
            _round_group(grid, group)
    return codes, errors, torch.cat(lines, dim=1)


def _round_group(grid: Grid, group: Group) -> None:
    """GPTQ's loop over the columns of ``group``; layouts as in :func:`_round_columns`."""
    scale, offset = group.line[:, 0]
    inverse, own = reciprocal(scale), group.factor.diagonal().unbind()
    for column in group.columns:
        code = group.codes[column] = grid.codes_by(group.work[column], inverse, offset)
        error = torch.sub(group.work[column], (code * scale).add_(offset), out=group.errors[column]).div_(own[column])
        group.work[column + 1 :].addr_(group.factor[column, column + 1 :], error, alpha=-1)


def _line(fit: Fit, columns: torch.Tensor, costs: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Scale and offset [2, 1, rows] of a group's ``columns`` [group, rows]."""
    return torch.stack([part[:, 0] for part in fit(columns.t(), costs, steps)])[:, None]


def objective(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """GPTQ's objective: trace of (W - Q) H (W - Q)^T, the weighted squared change of the linear's output."""
    change = (weight - rounded).double()
    return float(((change @ hessian.double()) * change).sum())
