"""SmoothQuant (arXiv 2211.10438): factors s = max|x|^a / max|W|^(1 - a) per channel, without a search.

They move outliers from the activations, where int8 rounds them badly, to the weights. As in the paper, only if a norm can absorb them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.calls import Entering
from mbq_gguf.calibration.stream import run_batch
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site

STRENGTH = 0.5  # a
SMALLEST = 1e-5  # lower bound of maxima and factors, for dead channels


def smooth_factors(largest: torch.Tensor, weights: Sequence[torch.Tensor], strength: float = STRENGTH) -> torch.Tensor:
    """s [columns] from max|x| [columns] over tokens and the ``weights`` [rows, columns] that read x."""
    of_weights = torch.cat([weight.detach().float() for weight in weights]).abs().amax(dim=0).clamp(min=SMALLEST)
    factors: torch.Tensor = largest.float().clamp(min=SMALLEST).pow(strength) / of_weights.pow(1 - strength)
    return factors.clamp(min=SMALLEST)


@torch.no_grad()
def smooth_layer(entering: Entering, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Factors for those of ``sites`` whose absorber is a norm, by site name, from all streams; the layer is not changed."""
    layer = entering.layer
    return {
        site.name: smooth_factors(_largest(entering, layer, site), [layer.linear(name).weight for name in site.readers])
        for site in sites
        if site.absorber is not None and not isinstance(layer.absorber(site), nn.Linear)
    }


def _largest(entering: Entering, layer: Layer, site: Site) -> torch.Tensor:
    """max|x| [columns] over all tokens of the input of ``site``."""
    found = []
    for batch in batches(entering.streams, layer):
        x = layer.input_of(site.readers[0], lambda batch=batch: run_batch(layer, batch))  # type: ignore[misc]
        found.append(x[0].abs().amax(dim=0))
    return torch.stack(found).amax(dim=0)
