"""Plans the types for the whole decoder: one run of the calibration set through the original layers, then the knapsack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from mbq_gguf.allocation.knapsack import Option
from mbq_gguf.allocation.plan import Plan, make_plan
from mbq_gguf.allocation.predict import Inputs, layer_options
from mbq_gguf.calibration.observe import TokenWeights, observe
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site


def allocate(
    layers: int,
    layer_of: Callable[[int], Layer],
    streams: Sequence[Streamed],
    weights_of: Callable[[int], TokenWeights],
    fisher: Mapping[str, torch.Tensor],
    *,
    damping: float | None,
    clip: bool,
    target: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """The types of least predicted cost at ``target`` bits per weight, by decoder-relative parameter name.

    ``layer_of`` gives a layer before equalisation, on the device. ``streams`` are before the first layer and are not changed. ``fisher``
    [layers] is by linear. ``damping`` and ``clip`` are GPTQ's (see layer_options). Raises UsageError for an unreachable target.
    """
    running = [replace(stream) for stream in streams]
    options: dict[str, dict[str, Option]] = {}
    counts: dict[str, int] = {}
    for index in range(layers):
        layer, weights = layer_of(index), weights_of(index)
        with coarse_products(layer.device):
            hessians = observe(layer, running, hessian_weights=weights).hessians
        inputs = {}
        for site in layer.sites:
            inputs[site.name] = Inputs(hessians.pop(site.name), total_weight(streams, weights, site))
        found = layer_options(layer, inputs, {name: float(values[index]) for name, values in fisher.items()}, damping, clip)
        for name, parts in layer.layout.by_linear(found).items():
            options[f"layers.{index}.{name}.weight"] = combine_options(parts)
            counts[f"layers.{index}.{name}.weight"] = layer.holder(name).weight.numel()
        progress(index + 1, layers)
    return make_plan(options, counts, target)


def combine_options(parts: Sequence[Mapping[str, Option]]) -> dict[str, Option]:
    """The options of matrices that must share one type, such as the parts of a fused linear, from the options of each."""
    return {kind: Option(sum(part[kind].size for part in parts), sum(part[kind].loss for part in parts)) for kind in parts[0]}


def total_weight(streams: Sequence[Streamed], weights: TokenWeights, site: Site) -> float:
    """The sum of the weights of all tokens."""
    return float(sum(weights(stream, site).double().sum() for stream in streams))
