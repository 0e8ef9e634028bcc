"""Rounds candidates in the search for equalisation factors: to nearest, or by GPTQ like the final layer.

With factors s the linears read x / s, so a candidate's Hessian is S^-1 H S^-1, and no candidate needs a pass over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mbq_gguf.calibration.moments import Moments
from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.quant_type import QuantType
from mbq_gguf.rounding.nearest import nearest_values
from mbq_gguf.rounding.sequence import Refinement, refined

# Maps the scaled float32 weights [rows, columns] of a site's linears and their factors [columns] to rounded weights.
Rounder = Callable[[Sequence[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def by_nearest(quant_types: Sequence[QuantType]) -> Rounder:
    """Round each linear to nearest in its own quant type."""

    def rounded(weights: Sequence[torch.Tensor], _factors: torch.Tensor) -> list[torch.Tensor]:
        return [nearest_values(weight, kept) for weight, kept in zip(weights, quant_types, strict=True)]

    return rounded


def by_gptq(quant_types: Sequence[QuantType], hessian: torch.Tensor, refinement: Refinement) -> Rounder:
    """Round with GPTQ, given the ``hessian`` [columns, columns] of the unscaled inputs; a type without a grid rounds to nearest.

    Of ``refinement``, only damping and range search are used. Adding the quantised prefix's inputs, half of the error correction and two
    refits hardly changes the ranking of candidates on layers 2 and 11 of the reference VLM: correlation 0.95 in MBQ's loss, 0.82 in AWQ's,
    which one sink token dominates.
    """
    plain = replace(refinement, error_correction=0.0, refits=0)

    def rounded(weights: Sequence[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
        found = Moments(hessian / factors / factors[:, None])
        values = list(weights)
        for kept in dict.fromkeys(quant_types):  # rows are independent, so linears of one type can be one matrix
            grid, alike = grid_of(kept), [number for number, own in enumerate(quant_types) if own is kept]
            matrix = torch.cat([weights[number] for number in alike])
            matrix = nearest_values(matrix, kept) if grid is None else refined(matrix, found, grid, plain).values(grid)
            for number, part in zip(alike, torch.split(matrix, [len(weights[number]) for number in alike]), strict=True):
                values[number] = part
        return values

    return rounded
