"""Triton kernel for the range search; each program processes some groups. Same operations as rounding/ranges.py, except for the order of
sums within a group."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mbq_gguf.formats.grid import Grid
from mbq_gguf.rounding.kernels.numbers import held, nearest_codes

TILE = 128  # numbers of a program, which is one warp: for 1792 rows an H200 takes 10 us, with 1024 numbers 26


def search(
    grid: Grid, groups: torch.Tensor, costs: torch.Tensor, steps: torch.Tensor | None, shares: tuple[float, ...], turns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`mbq_gguf.rounding.kernels.compiled.search`."""
    flat, costs = groups.reshape(-1, grid.group), costs.contiguous()
    flat_steps = costs if steps is None else steps.reshape(-1, 2).contiguous()  # any tensor: it is not read
    scale, offset = (torch.empty(*groups.shape[:-1], 1, device=groups.device) for _ in range(2))
    some = max(1, TILE // grid.group)
    _search[(triton.cdiv(len(flat), some),)](
        flat, costs, flat_steps, _shares(shares, groups.device), scale, offset, len(flat), costs.numel() // grid.group,
        flat.stride(0), flat.stride(1), grid.fit is not None, len(shares), turns, grid.low, grid.high, grid.held_pair is not None,
        steps is not None, grid.scale.low, grid.scale.high, grid.offset.low, grid.offset.high, grid.group, some,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, offset


@cache
def _shares(shares: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(shares, device=device)


@triton.jit
def _search(
    groups, costs, steps, shares, scale, offset, count, kinds, of_row, of_column, FIT: tl.constexpr, SHARES: tl.constexpr,
    TURNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORD: tl.constexpr, STEPS: tl.constexpr,
    SL: tl.constexpr, SH: tl.constexpr, OL: tl.constexpr, OH: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, G)
    there = row < count
    at = column[:, None].to(tl.int64) * of_column + row[None, :].to(tl.int64) * of_row
    weights = tl.load(groups + at, mask=there[None, :], other=0.0)
    cost = tl.load(costs + (row % kinds)[None, :] * G + column[:, None])
    none = tl.zeros((R,), tl.float32)
    of_scale, of_offset = none, none
    if STEPS:
        of_scale, of_offset = tl.load(steps + 2 * row, mask=there, other=0.0), tl.load(steps + 2 * row + 1, mask=there, other=0.0)
    low, high = tl.min(weights, axis=0), tl.max(weights, axis=0)
    best, beside, least = none, none, none + float("inf")
    if FIT:
        first, last = (tl.minimum(low, 0.0), tl.maximum(high, 0.0)) if WORD else (low, high)
        tried = tl.math.div_rn(last, none + HIGH) - tl.math.div_rn(first, none + HIGH)
        tried, base = held(tried, first, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
        best, beside, least = _better(weights, cost, tried, base, best, beside, least, LOW, HIGH)
    if LOW < 0:  # no offset
        reach = tl.where(tl.abs(low) > tl.abs(high), low, high) * (1.0 / LOW)
        for turn in range(2 * SHARES):
            share = tl.load(shares + turn // 2)
            tried = reach * (share if turn % 2 == 0 else -share)
            tried, base = held(tried, none, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
            best, beside, least = _better(weights, cost, tried, base, best, beside, least, LOW, HIGH)
    else:
        for turn in range(SHARES * SHARES):
            base = low * tl.load(shares + turn // SHARES)
            tried, base = held((high - low) * (1.0 / HIGH), base, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
            tried = (high * tl.load(shares + turn % SHARES) - base) * (1.0 / HIGH)
            tried, base = held(tried, base, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
            best, beside, least = _better(weights, cost, tried, base, best, beside, least, LOW, HIGH)
    share = tl.math.div_rn(cost, tl.sum(cost, axis=0)[None, :] + tl.zeros_like(cost))
    for _ in range(TURNS):
        codes = nearest_codes(weights, best, beside, LOW, HIGH)
        mean_code, mean = tl.sum(codes * share, axis=0), tl.sum(weights * share, axis=0)
        centred = (codes - mean_code[None, :]) * share
        slope = tl.math.div_rn(tl.sum(centred * weights, axis=0), tl.maximum(tl.sum(centred * codes, axis=0), 1e-12))
        tried, base = held(slope, mean - slope * mean_code, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
        weighted = codes * share
        slope = tl.sum(weighted * (weights - base[None, :]), axis=0)
        slope = tl.math.div_rn(slope, tl.maximum(tl.sum(weighted * codes, axis=0), 1e-12))
        tried, base = held(slope, base, of_scale, of_offset, WORD, STEPS, SL, SH, OL, OH)
        best, beside, least = _better(weights, cost, tried, base, best, beside, least, LOW, HIGH)
    tl.store(scale + row, best, mask=there)
    tl.store(offset + row, beside, mask=there)


@triton.jit
def _better(weights, costs, scale, offset, best, beside, least, LOW: tl.constexpr, HIGH: tl.constexpr):
    """ranges._better; the first pair is always accepted."""
    off = nearest_codes(weights, scale, offset, LOW, HIGH) * scale[None, :] + offset[None, :] - weights
    error = tl.sum(off * off * costs, axis=0)
    better = error < least
    if LOW >= 0:
        better &= (scale > 0) | (least == float("inf"))
    return tl.where(better, scale, best), tl.where(better, offset, beside), tl.where(better, error, least)
