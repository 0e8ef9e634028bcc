"""Round the linears of one decoder layer, each into the container that its row size allows."""

from __future__ import annotations

import torch
from torch import nn

from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.registry import container_for
from mbq_gguf.models.decoder import GROUPS, linear
from mbq_gguf.rounding.gptq import inverse_factor, round_gptq
from mbq_gguf.rounding.nearest import Rounded, round_nearest


def round_layer(
    layer: nn.Module, container: str, hessians: dict[str, torch.Tensor] | None, damping: float
) -> dict[str, tuple[str, Rounded]]:
    """Container name and rounded weight of every linear, by its name in the layer; the layer's own weights become the rounded ones.

    ``hessians`` [columns, columns] by group name, of the inputs that the layer's linears now take; None rounds to nearest, as does a
    container without a grid (F16 and other fallbacks).
    """
    out = {}
    for group in GROUPS:
        kept = container_for(container, linear(layer, group.linears[0]).in_features)
        grid = grid_of(kept)
        factor = inverse_factor(hessians[group.name], damping) if hessians is not None and grid is not None else None
        for name in group.linears:
            weight = linear(layer, name).weight
            if factor is not None and grid is not None:
                rounded = round_gptq(weight.detach(), factor, grid)
            else:
                rounded = round_nearest(weight.detach(), kept)
            weight.data.copy_(rounded.weight)
            out[name] = (kept.name, rounded)
    return out
