"""Folds channel factors into weights: the following linears get the factors, the preceding operation their inverse.

y = W x = (W diag(s)) (x / s). The 1 / s goes into a norm's weight (and bias), or into the rows (and bias) of the linear that made x: v_proj
through the attention average, up_proj through the product with the gate.
"""

from __future__ import annotations

import torch
from torch import nn

from mbq_gguf.models.layer import Layer, norm_offset
from mbq_gguf.models.layout import Site


def repeats(layer: Layer, site: Site) -> int:
    """The number of input channels of the site's linears that share one factor: the query heads per key/value head for o_proj, else 1.

    0 if nothing can absorb the factors, or the shapes do not allow folding.
    """
    if site.absorber is None:
        return 0
    previous = layer.absorber(site)
    if not isinstance(previous, nn.Linear):
        return 1
    columns = layer.linear(site.readers[0]).in_features
    return columns // previous.out_features if columns % previous.out_features == 0 else 0


def spread(layer: Layer, site: Site, factors: torch.Tensor) -> torch.Tensor:
    """Expand factors from one per output of ``site.absorber`` to one per input channel of the site's linears.

    With grouped queries, query head h reads value head h // repeats, so each value head's factors are repeated ``repeats`` times.
    """
    times = repeats(layer, site)
    if times == 1:
        return factors
    return factors.view(-1, layer.head_dim).repeat_interleave(times, dim=0).reshape(-1)


def gather(layer: Layer, site: Site, values: torch.Tensor) -> torch.Tensor:
    """The mean of ``values`` (one per input channel) over the channels that share a factor; the counterpart of :func:`parallel_map`."""
    times = repeats(layer, site)
    if times == 1:
        return values
    return values.view(-1, times, layer.head_dim).mean(dim=1).reshape(-1)


@torch.no_grad()
def fold(layer: Layer, site: Site, factors: torch.Tensor) -> None:
    """Fold ``factors`` (one per output of ``site.absorber``) into ``layer``, in place and in its dtype."""
    previous = layer.absorber(site)
    bias = getattr(previous, "bias", None)
    weight = previous.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(previous, nn.Linear):
        weight.div_(factors[:, None])
    else:
        offset = norm_offset(previous)
        weight.copy_((weight + offset) / factors - offset)
    if isinstance(bias, torch.Tensor):
        bias.div_(factors)
    inputs = spread(layer, site, factors)
    for name in site.readers:
        layer.linear(name).weight.mul_(inputs)
