"""Predicts the loss of rounding a tensor to a quant type, in nats of the answers' mean KL divergence.

To second order, and assuming that errors of different tensors are independent, a change dW of a linear's weight costs

    fisher * tr(dW H dW^T) / (sum of token weights),    H = sum over tokens of w_t x_t x_t^T,

that is, the mean squared error of the output times the loss per such error (calibration.sensitivity.Sensitivity; K-FAC, arXiv 1503.05671,
section 3, with the second factor reduced to its mean diagonal). The common unit allows costs of different tensors to be compared and added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mbq_gguf.allocation.knapsack import Option
from mbq_gguf.formats.grid import Grid, grid_of
from mbq_gguf.formats.quant_type import QuantType
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models.layer import Layer
from mbq_gguf.rounding.gptq import objective
from mbq_gguf.rounding.inverse import inverse_factor
from mbq_gguf.rounding.nearest import nearest_values
from mbq_gguf.rounding.ranges import search_range, search_steps

# Without MBQ3 and MBQ3_64: at the same sizes, MBQ3S and MBQ3S_64 lose less.
CANDIDATES = ("Q2_K", "MBQ3S", "Q3_K", "MBQ3S_64", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
ROWS = 128  # evenly spaced rows of a weight that a prediction is based on


@dataclass(frozen=True)
class Inputs:
    """Second moments of a site's inputs: ``hessian`` [columns, columns] and the sum of its tokens' weights."""

    hessian: torch.Tensor
    weight: float

    def cost(self, change: torch.Tensor, fisher: float) -> float:
        """The loss in nats of a ``change`` [rows, columns] of a weight."""
        return fisher * objective(change, torch.zeros_like(change), self.hessian) / self.weight


def candidates(columns: int) -> list[QuantType]:
    """The candidate types for rows of ``columns`` weights; F16 if no block size divides them."""
    return [kind for kind in map(quant_type, CANDIDATES) if kind.fits(columns)] or [quant_type("F16")]


@torch.no_grad()
def layer_options(
    layer: Layer, inputs: Mapping[str, Inputs], fisher: Mapping[str, float], damping: float | None, clip: bool
) -> dict[str, dict[str, Option]]:
    """Bytes and predicted loss of each linear of ``layer`` in each candidate type, by names of linear and type.

    ``inputs`` are by site, ``fisher`` by linear. ``damping`` is GPTQ's, None for rounding to nearest; ``clip`` says whether GPTQ
    searches ranges. Losses are estimated from at most ROWS rows and scaled up.
    """
    out: dict[str, dict[str, Option]] = {}
    for site in layer.sites:
        found = inputs[site.name]
        costs = None if damping is None else inverse_factor(found.hessian, damping).diagonal().square().reciprocal()
        for name in site.readers:
            weight = layer.linear(name).weight.detach()
            rows = weight[:: -(-len(weight) // ROWS)].float()
            out[name] = {}
            for kind in candidates(weight.shape[1]):
                grid = grid_of(kind)
                if costs is None or grid is None:
                    loss = found.cost(nearest_values(rows, kind) - rows, fisher[name])
                else:
                    loss = fisher[name] * predict_objective(rows, costs, grid, clip) / found.weight
                out[name][kind.name] = Option(len(weight) * kind.row_bytes(weight.shape[1]), loss * len(weight) / len(rows))
    return out


def predict_objective(weight: torch.Tensor, costs: torch.Tensor, grid: Grid, clip: bool) -> float:
    """An estimate of GPTQ's objective for ``weight`` [rows, columns] without running it; ``costs`` [columns] are 1 / U[j, j] ** 2.

    The objective is the sum over columns of (error / U[j, j]) ** 2, where earlier columns have already changed the weights. Rounding a
    changed weight has about the same error as rounding the original one, if scales and offsets are fitted in the same way.
    """
    groups, by_group = weight.view(len(weight), -1, grid.group), costs.view(-1, grid.group)
    if grid.fit is not None and not clip:
        scale, offset = grid.fit(groups)
    else:
        blocks = zip(weight.view(len(weight), -1, grid.block).unbind(1), costs.view(-1, grid.block).unbind(0), strict=True)
        steps = torch.stack([search_steps(grid, *block) for block in blocks], dim=1) if not grid.free else None
        each = None if steps is None else steps.repeat_interleave(grid.block // grid.group, dim=1)
        scale, offset = search_range(grid, groups, by_group, each)
    return float(((grid.codes(groups, scale, offset) * scale + offset - groups).square() * by_group).double().sum())


@torch.no_grad()
def measured_costs(
    layer: Layer,
    before: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Inputs],
    fisher: Mapping[str, float],
    factors: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """The measured loss of rounding each linear of ``layer``, by the linear's name.

    ``before`` are its weights just before rounding, ``inputs`` (by site) those of the layer with ``factors`` (by site) folded.
    """
    out = {}
    for site in layer.sites:
        for name in site.readers:
            change = layer.linear(name).weight - before[name]
            scale = output_scale(layer, factors, name)
            out[name] = inputs[site.name].cost(change if scale is None else change * scale[:, None], fisher[name])
    return out


def output_scale(layer: Layer, factors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The divisors of linear ``name``'s outputs from folding ``factors`` (by site), one per output; None if there are none."""
    following = [site for site in layer.sites if site.absorber == name and site.name in factors]
    return factors[following[0].name] if following else None
