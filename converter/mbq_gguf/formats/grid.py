"""Quant types with evenly spaced values, w = scale * code + offset per group, in PyTorch: for range search and column-by-column rounding.

Scale and offset are the values that the file stores, so a weight rounded here is bit for bit the weight that ggml reads. In K-quants they
are integer multiples of two fp16 steps that a super-block of 256 weights stores. In other types each is a separate fp16 number, or the
offset is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from mbq_gguf.formats import k_quants, legacy, mbq3, mbq3s, row_scale
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType

F16_MAX = 65504.0
Pair = tuple[torch.Tensor, torch.Tensor]  # scale and offset
Fit = Callable[[torch.Tensor], Pair]


@dataclass(frozen=True)
class Parameter:
    """The values that a scale or an offset can have: ``low`` to ``high`` times a step of the block, or any fp16 number (both None)."""

    low: int | None = None
    high: int | None = None

    @property
    def free(self) -> bool:
        """Whether it is a separate fp16 number."""
        return self.low is None or self.high is None

    @property
    def stepped(self) -> bool:
        """Whether the block stores a step for it."""
        return not self.free and self.low != self.high

    def nearest(self, values: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
        """The representable value nearest to each of ``values``; without a step, any number with an allowed sign."""
        if self.low is None or self.high is None:
            return to_f16(values)
        if not self.stepped:
            return torch.zeros_like(values)
        if step is None:
            return values.clamp(-torch.inf if self.low < 0 else 0.0, torch.inf if self.high > 0 else 0.0)
        return (values / step).masked_fill_(step == 0, 0.0).round_().clamp_(self.low, self.high) * step

    def step(self, values: torch.Tensor) -> torch.Tensor:
        """The fp16 step [rows] with which the largest of ``values`` [rows, groups] gets the largest multiple."""
        if self.low is None or self.high is None or not self.stepped:
            return values.new_zeros(len(values))
        extreme = values.gather(1, values.abs().argmax(dim=1, keepdim=True))[:, 0]
        return to_f16(extreme / max(self.low, self.high, key=abs))


@dataclass(frozen=True)
class Grid:
    """``group`` weights share a scale and an offset, ``block`` weights (one ggml block) share their steps; codes are ``low`` to ``high``.

    ``pack`` maps codes [blocks, block] (uint8, counted from ``low``), scale and offset [blocks, groups] and steps [blocks, 2] to packed
    blocks on the same device. ``fit`` computes the type's own scale and offset [n, 1] for groups [n, group], with which rounding to nearest
    equals ggml's; None if ggml searches for them. ``held_pair`` gives the nearest representable scale and offset, for types in which the
    possible offsets depend on the scale.
    """

    block: int
    group: int
    low: int
    high: int
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    scale: Parameter = Parameter()
    offset: Parameter = Parameter()
    fit: Fit | None = None
    held_pair: Callable[[torch.Tensor, torch.Tensor], Pair] | None = None

    def held(self, scale: torch.Tensor, offset: torch.Tensor, steps: torch.Tensor | None = None) -> Pair:
        """The nearest representable scale and offset, given a block's ``steps`` [..., 2]; without steps, K-quants can have any real
        numbers."""
        if self.held_pair:
            return self.held_pair(scale, offset)
        of_scale, of_offset = (None, None) if steps is None else (steps[..., :1], steps[..., 1:])
        return self.scale.nearest(scale, of_scale), self.offset.nearest(offset, of_offset)

    @property
    def free(self) -> bool:
        """Whether scales and offsets are separate fp16 numbers, as a least-squares refit assumes."""
        return self.scale.free and self.offset.free

    def codes(self, weights: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The nearest codes as float32, ties to even. If the scale is 0, the code nearest to 0."""
        return self.codes_by(weights, reciprocal(scale), offset)

    def codes_by(self, weights: torch.Tensor, inverse: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The same, given the scale's :func:`reciprocal`."""
        return (weights - offset).mul_(inverse).clamp_(self.low, self.high).round_()

    def packed(self, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Bytes [rows, row_bytes], on the same device, for codes [rows, columns], scale and offset [rows, columns / group], steps
        [rows, columns / block, 2]."""
        groups = self.block // self.group
        counted = (codes - self.low).to(torch.uint8).reshape(-1, self.block)
        parts = (counted, scale.reshape(-1, groups), offset.reshape(-1, groups), steps.reshape(-1, 2))
        return self.pack(*parts).reshape(len(codes), -1)


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, or 0 if the scale is 0. Avoids torch.where, which copies a Python number to the GPU and waits for it."""
    return (1.0 / scale).masked_fill_(scale == 0, 0.0)


def to_f16(values: torch.Tensor) -> torch.Tensor:
    """``values`` rounded to fp16, in float32; saturates at fp16's largest number."""
    return values.clamp(-F16_MAX, F16_MAX).half().float()


@cache
def grid_of(quant_type: QuantType) -> Grid | None:
    """The grid of ``quant_type``, or None if its values are not evenly spaced (IQ types, floats)."""
    zero = Parameter(0, 0)
    sixes = Parameter(0, 63), Parameter(-63, 0)
    size = quant_type.block_size
    match quant_type.name:
        case "MBQ3" | "MBQ3_64":
            return Grid(size, size, 0, mbq3.LEVELS, _planes(_pair_bytes), fit=_fit_range)
        case "MBQ3S" | "MBQ3S_64":
            pack = _planes(_scale_words)
            return Grid(size, size // mbq3s.HALVES, 0, mbq3.LEVELS, pack, fit=_fit_scale_word, held_pair=_nearest_scale_word)
        case "Q4_0":
            return Grid(size, size, -8, 7, _numpy(legacy.pack_q4_0), offset=zero)
        case "W4A8" | "W8A8":  # from quant_type_for: one block per row
            largest = row_scale.ROW_SCALES[quant_type.name].largest
            pack = _numpy(partial(_pack_rows, quant_type.name))
            return Grid(size, size, -largest - 1, largest, pack, offset=zero, fit=partial(_fit_largest, largest))
        case "Q4_1":
            return Grid(size, size, 0, 15, _numpy(legacy.pack_q4_1))
        case "Q5_0":
            return Grid(size, size, -16, 15, _numpy(legacy.pack_q5_0), offset=zero)
        case "Q5_1":
            return Grid(size, size, 0, 31, _numpy(legacy.pack_q5_1))
        case "Q8_0":
            return Grid(size, size, -128, 127, _numpy(legacy.pack_q8_0), offset=zero)
        case "Q2_K":
            return Grid(size, 16, 0, 3, _multiples(k_quants.pack_q2_k), Parameter(0, 15), Parameter(-15, 0))
        case "Q3_K":
            return Grid(size, 16, -4, 3, _multiples(k_quants.pack_q3_k), Parameter(-32, 31), zero)
        case "Q4_K":
            return Grid(size, 32, 0, 15, _multiples(k_quants.pack_q4_k), *sixes)
        case "Q5_K":
            return Grid(size, 32, 0, 31, _multiples(k_quants.pack_q5_k), *sixes)
        case "Q6_K":
            return Grid(size, 16, -32, 31, _multiples(k_quants.pack_q6_k), Parameter(-128, 127), zero)
    return None


def _pack_rows(name: str, codes: Bytes, scale: Floats, offset: Floats) -> Bytes:
    return row_scale.pack(name, codes, scale)


def _fit_largest(largest: int, groups: torch.Tensor) -> Pair:
    """The scale that maps the largest weight to the largest code, as in row_scale."""
    amax = groups.abs().amax(dim=-1, keepdim=True)
    return to_f16(amax / amax.new_full((), float(largest))), torch.zeros_like(amax)


def _fit_range(groups: torch.Tensor) -> Pair:
    """Scale and minimum from the range of each group, with the same operations as mbq3.block_parameters."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    low, high = low + 0.0, high + 0.0  # -0 becomes +0, as in the stored block
    return to_f16(_step(low, high)), to_f16(low)


def _step(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number, which rounds differently.
    divisor = low.new_full((), float(mbq3.LEVELS))
    return high / divisor - low / divisor


def _fit_scale_word(groups: torch.Tensor) -> Pair:
    """Scale and minimum from the range of each group and zero, with the same operations as mbq3s.group_parameters."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    low, high = low.clamp(max=0.0) + 0.0, high.clamp(min=0.0) + 0.0
    return _nearest_scale_word(_step(low, high), low)


def _nearest_scale_word(scale: torch.Tensor, minimum: torch.Tensor) -> Pair:
    """The same operations as mbq3s.nearest_parameters; a negative scale becomes 0."""
    bits = scale.clamp(0.0, F16_MAX).half().view(torch.int16).int()
    bits = ((bits + 15 + (bits >> mbq3s.DROPPED_BITS & 1)) >> mbq3s.DROPPED_BITS).clamp(max=mbq3s.LARGEST_SCALE)
    held = (bits << mbq3s.DROPPED_BITS).to(torch.int16).view(torch.half).float()
    zero = (minimum * -mbq3s.ZERO_STEPS * reciprocal(held)).clamp(0.0, mbq3s.LARGEST_ZERO).round_()
    return held, -(held * zero) / mbq3s.ZERO_STEPS


def _numpy(pack: Callable[..., Bytes]) -> Callable[..., torch.Tensor]:
    """Wrap a NumPy ``pack`` of codes, scale and offset for tensors; these blocks have no steps."""

    def packed(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return _on_host(pack, codes, scale, offset)

    return packed


def _on_host(pack: Callable[..., Bytes], *parts: torch.Tensor) -> torch.Tensor:
    """The result of a NumPy ``pack`` of tensors, back on their device."""
    return torch.from_numpy(pack(*(part.cpu().numpy() for part in parts))).to(parts[0].device)


def _planes(head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Pack blocks with a ``head`` of scale and offset before codes in planes, on the device: 37888 x 3584 weights take 0.39 s in all on a
    GPU, and 0.46 s if the host makes the heads and assembles the blocks."""

    def packed(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(scale, offset), mbq3.pack_planes(codes, torch.concatenate)], dim=1)

    return packed


def _pair_bytes(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """mbq3.pair_bytes for tensors."""
    return torch.cat([scale, minimum], dim=1).half().view(torch.uint8)


def _scale_words(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The same operations as mbq3s.scale_words; scales must not be negative."""
    upper = scale.half().view(torch.int16).int() >> mbq3s.DROPPED_BITS
    zero = (minimum * -mbq3s.ZERO_STEPS / scale).masked_fill_(scale == 0, 0.0).round_().int()
    word = upper << mbq3s.ZERO_BITS | zero
    return torch.stack([word & 255, word >> 8], dim=2).to(torch.uint8).flatten(1)


def _multiples(pack: Callable[..., Bytes]) -> Callable[..., torch.Tensor]:
    """Wrap a NumPy ``pack`` of codes, multiples and steps for tensors; K-quants store the amount to subtract, so the offset is negated."""

    def packed(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        step = [steps[:, :1], steps[:, 1:]]
        multiples = [torch.where(s != 0, v / s, 0.0).round_().long() for v, s in zip((scale, -offset), step, strict=True)]
        return _on_host(pack, codes, *multiples, *step)

    return packed
