"""Triton kernels for GPTQ's and coordinate descent's loops over columns; each program processes some rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbq_gguf.rounding.kernels.group import Group
from mbq_gguf.rounding.kernels.numbers import reciprocal, whole

# Numbers of a program, which is one warp, at most. Few rows take less each, for about so many programs: 1792 rows take an H200 22 us for
# GPTQ's 64 columns and 68 for the descent's 128 instead of 35 and 78.
TILE = 2048
PROGRAMS = {"gptq": 1800, "descent": 600}
CARRIED = 128  # rows and columns of a program


def round_group(group: Group) -> None:
    """GPTQ's loop over the group's columns: :func:`mbq_gguf.rounding.gptq._round_group`."""
    columns, rows = group.work.shape
    padded, some = _tile(columns, rows, PROGRAMS["gptq"])
    _round_group[(triton.cdiv(rows, some),)](
        group.work, group.factor, group.line, group.codes, group.errors, rows, columns, group.columns.start, group.factor.stride(0),
        group.low, group.high, len(group.columns), padded, some, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def descend_columns(
    slope: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """As :func:`mbq_gguf.rounding.kernels.compiled.descend_columns`."""
    changes = torch.empty_like(codes)
    columns, rows = slope.shape
    padded, some = _tile(columns, rows, PROGRAMS["descent"])
    _descend_columns[(triton.cdiv(rows, some),)](
        slope, matrix, scales, codes, changes, rows, matrix.stride(0), low, high,
        columns, padded, some, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return changes


def _tile(columns: int, rows: int, programs: int) -> tuple[int, int]:
    """Columns and rows of a program, powers of two."""
    padded = triton.next_power_of_2(columns)
    return padded, max(1, min(TILE // padded, max(2, triton.next_power_of_2(triton.cdiv(rows, programs)))))


def carry(later: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
    """Subtract ``factor`` [columns, n] times ``errors`` [n, rows] from ``later`` [columns, rows]. A library would choose the order of
    its sums by the number of rows."""
    columns, rows = later.shape
    if columns:
        _carry[(triton.cdiv(rows, CARRIED), triton.cdiv(columns, CARRIED))](
            later, factor, errors, columns, rows, *factor.stride(), len(errors), CARRIED, num_warps=8,
        )  # fmt: skip


@triton.jit
def _round_group(
    work, factor, line, codes, errors, rows, columns, start, stride, low, high, COUNT: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    there = row < rows
    tile_at = column[:, None] * rows + row[None, :]
    inside = (column >= start)[:, None] & (column < columns)[:, None] & there[None, :]
    tile = tl.load(work + tile_at, mask=inside, other=0.0)
    of_scale, of_offset = tl.load(line + row, mask=there, other=0.0), tl.load(line + rows + row, mask=there, other=0.0)
    inverse = reciprocal(of_scale)
    for step in range(COUNT):
        j = start + step
        later = tl.load(factor + j * stride + column, mask=(column > j) & (column < columns), other=0.0)
        own = tl.load(factor + j * stride + j)
        weight = tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)
        code = tl.minimum(tl.maximum((weight - of_offset) * inverse, low), high)
        code = whole(code)
        error = tl.math.div_rn(weight - (code * of_scale + of_offset), tl.full((R,), 0.0, tl.float32) + own)
        tl.store(codes + j * rows + row, code, mask=there)
        tl.store(errors + j * rows + row, error, mask=there)
        tile = tl.math.fma(later[:, None] + tl.zeros_like(tile), -error[None, :] + tl.zeros_like(tile), tile)
    tl.store(work + tile_at, tile, mask=inside & (column >= start + COUNT)[:, None])


@triton.jit
def _descend_columns(slope, matrix, scales, codes, changes, rows, stride, low, high, COUNT: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    there = row < rows
    tile_at = column[:, None] * rows + row[None, :]
    tile = tl.load(slope + tile_at, mask=(column < COUNT)[:, None] & there[None, :], other=0.0)
    for j in range(COUNT):
        later = tl.load(matrix + j * stride + column, mask=(column > j) & (column < COUNT), other=0.0)  # a row of the symmetric matrix
        own = tl.load(matrix + j * stride + j)
        scale, had = tl.load(scales + j * rows + row, mask=there, other=0.0), tl.load(codes + j * rows + row, mask=there, other=0.0)
        inverse = reciprocal(scale)
        pull = tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)
        code = tl.math.div_rn(pull * inverse, tl.full((R,), 0.0, tl.float32) + own) + had
        code = whole(tl.minimum(tl.maximum(code, low), high))
        change = (code - had) * scale
        tl.store(codes + j * rows + row, code, mask=there)
        tl.store(changes + j * rows + row, change, mask=there)
        tile = tl.math.fma(later[:, None] + tl.zeros_like(tile), -change[None, :] + tl.zeros_like(tile), tile)


@triton.jit
def _carry(later, factor, errors, columns, rows, of_column, of_error, COUNT: tl.constexpr, TILE: tl.constexpr):
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = column[:, None].to(tl.int64) * rows + row[None, :]
    there = (column < columns)[:, None] & (row < rows)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, COUNT, 32):
        error = first + tl.arange(0, 32)
        of_errors = tl.load(factor + column[:, None] * of_column + error[None, :] * of_error, mask=(column < columns)[:, None], other=0.0)
        from_errors = tl.load(errors + error[:, None] * rows + row[None, :], mask=(row < rows)[None, :], other=0.0)
        total = tl.dot(of_errors, from_errors, total, input_precision="ieee")
    tl.store(later + at, tl.load(later + at, mask=there) - total, mask=there)
