"""Triton kernels for refits: fill the systems of some rows, and round their solution number by number; one row per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbq_gguf.rounding.kernels.numbers import to_f16, word_offset, word_scale

ROWS, PART = 64, 64  # rows of a program that fills systems, and how much of a group it takes at a time


def take_steps(
    halfway: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, word: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`mbq_gguf.rounding.kernels.compiled.take_steps`."""
    rows, groups = scale.shape
    lower = lower.contiguous()
    new_scale, new_offset = torch.empty_like(scale), torch.empty_like(offset)
    _take_steps[(rows,)](
        halfway, lower, scale, offset, new_scale, new_offset, groups, lower.stride(0), lower.stride(1), halfway.stride(0),
        word, triton.next_power_of_2(2 * groups), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return new_scale, new_offset


def fill(system: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, groups: int) -> None:
    """As :func:`mbq_gguf.rounding.kernels.compiled.fill`."""
    rows, columns = codes.shape
    group = columns // groups
    _fill[(triton.cdiv(rows, ROWS), groups)](
        system, codes, hessian, rows, columns, groups, system.stride(0), system.stride(1), group, min(group, PART), ROWS, num_warps=4,
        num_stages=3 if group <= PART else 1,
    )  # fmt: skip


@triton.jit
def _take_steps(
    halfway, lower, scale, offset, new_scale, new_offset, groups, of_row, of_number, of_half, WORD: tl.constexpr, N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    left = tl.load(halfway + row * of_half + at, mask=at < 2 * groups, other=0.0)
    lower += row * of_row
    for group in range(groups):
        index = 2 * (groups - group) - 1
        first = tl.load(lower + index * of_number + at, mask=at <= index, other=0.0)
        second = tl.load(lower + (index - 1) * of_number + at, mask=at < index, other=0.0)
        had, had_offset = tl.load(scale + row * groups + group), tl.load(offset + row * groups + group)
        change = tl.sum(tl.where(at == index, left, 0.0)) / tl.sum(tl.where(at == index, first, 0.0))
        new = (had.to(tl.float64) + change).to(tl.float32)
        new = word_scale(new) if WORD else to_f16(new)
        left -= (new - had).to(tl.float64) * first
        tl.store(new_scale + row * groups + group, new)
        change = tl.sum(tl.where(at == index - 1, left, 0.0)) / tl.sum(tl.where(at == index - 1, second, 0.0))
        moved = (had_offset.to(tl.float64) + change).to(tl.float32)
        moved = word_offset(new, moved) if WORD else to_f16(moved)
        left -= (moved - had_offset).to(tl.float64) * second
        tl.store(new_offset + row * groups + group, moved)
    tl.store(halfway + row * of_half + at, left, mask=at < 2 * groups)


@triton.jit
def _fill(system, codes, hessian, rows, columns, groups, of_row, of_number, G: tl.constexpr, PART: tl.constexpr, R: tl.constexpr):
    row, inner = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, PART)
    there, g = row < rows, tl.program_id(1)
    codes += row[:, None].to(tl.int64) * columns + inner[None, :]
    hessian += (g * G + inner)[:, None].to(tl.int64) * columns + inner[None, :]
    system += row.to(tl.int64) * of_row + (2 * (groups - g) - 1) * of_number  # of the group's scale; its offset's row lies before it
    for h in range(g, groups):  # products in TF32 three times: codes are exact in it, so what is left out is below float32's own rounding
        both, scale_offset, offset_scale = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
        offsets = 0.0
        for across in tl.static_range(0, G, PART):
            others = tl.load(codes + h * G + across, mask=there[:, None], other=0.0)
            by_scale, by_offset = tl.zeros((R, PART), tl.float32), tl.zeros((PART,), tl.float32)
            for down in tl.static_range(0, G, PART):
                own = tl.load(codes + g * G + down, mask=there[:, None], other=0.0)
                tile = tl.load(hessian + down * columns + h * G + across)
                by_scale = tl.dot(own, tile, by_scale, input_precision="tf32x3")
                by_offset += tl.sum(tile, axis=0)
            both += tl.sum(by_scale * others, axis=1)
            scale_offset += tl.sum(by_scale, axis=1)
            offset_scale += tl.sum(others * by_offset[None, :], axis=1)
            offsets += tl.sum(by_offset)
        at = system + 2 * (groups - h) - 1
        tl.store(at, both.to(tl.float64), mask=there)
        tl.store(at - 1, scale_offset.to(tl.float64), mask=there)
        tl.store(at - of_number, offset_scale.to(tl.float64), mask=there)
        tl.store(at - of_number - 1, (offsets + tl.zeros((R,), tl.float32)).to(tl.float64), mask=there)
