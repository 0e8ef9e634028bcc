"""Representable scales, offsets and codes, for Triton kernels, with the same operations as formats/grid.py."""

from __future__ import annotations

import triton
import triton.language as tl

NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added and taken off it leaves the nearest whole number, ties to even


@triton.jit
def whole(values):
    """The nearest integers, ties to even, for values below 2 ** 22."""
    return (values + NEAREST) - NEAREST


@triton.jit
def to_f16(values):
    """float32 values rounded to fp16, saturating at its largest number."""
    return tl.minimum(tl.maximum(values, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def reciprocal(scale):
    """1 / scale, rounded to nearest; 0 if the scale is 0."""
    return tl.where(scale == 0, 0.0, tl.math.div_rn(scale * 0.0 + 1.0, scale))


@triton.jit
def word_scale(scale):
    """The upper 10 bits of a scale's fp16, rounded to nearest: mbq3s.nearest_parameters."""
    bits = tl.minimum(tl.maximum(scale, 0.0), 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    bits = tl.minimum((bits + 15 + ((bits >> 5) & 1)) >> 5, 0x7BFF >> 5)
    return (bits << 5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def word_offset(scale, offset):
    """The offset rounded to -63 to 0 eighths of the scale."""
    zero = tl.minimum(tl.maximum(offset * -8.0 * reciprocal(scale), 0.0), 63.0)
    return -(scale * whole(zero)) * 0.125


@triton.jit
def nearest(values, step, STEPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Parameter.nearest of formats/grid.py."""
    if LOW is None:
        held = to_f16(values)
    elif LOW == HIGH:
        held = values * 0.0
    elif not STEPS:
        held = values
        if LOW >= 0:
            held = tl.maximum(values, 0.0)
        if HIGH <= 0:
            held = tl.minimum(values, 0.0)
    else:
        multiple = tl.where(step == 0, 0.0, tl.math.div_rn(values, step))
        held = whole(tl.minimum(tl.maximum(multiple, LOW), HIGH)) * step
    return held


@triton.jit
def held(
    scale, offset, scale_step, offset_step, WORD: tl.constexpr, STEPS: tl.constexpr,
    SL: tl.constexpr, SH: tl.constexpr, OL: tl.constexpr, OH: tl.constexpr,
):  # fmt: skip
    """Grid.held: the pair of a scale word; otherwise each separately, with the limits of its multiples, or None for fp16 numbers."""
    if WORD:
        of_scale = word_scale(scale)
        of_offset = word_offset(of_scale, offset)
    else:
        of_scale, of_offset = nearest(scale, scale_step, STEPS, SL, SH), nearest(offset, offset_step, STEPS, OL, OH)
    return of_scale, of_offset


@triton.jit
def nearest_codes(weights, scale, offset, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes from LOW to HIGH of ``weights`` [weights of a group, groups]; ``scale`` and ``offset`` are one per group [groups]."""
    return whole(tl.minimum(tl.maximum((weights - offset[None, :]) * reciprocal(scale)[None, :], LOW), HIGH))
