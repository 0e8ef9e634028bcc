"""Inputs and their second moments as the linears of a folded layer take them, from those of the layer as it was."""

from __future__ import annotations

import torch

from mbq_gguf.calibration.moments import Moments
from mbq_gguf.calibration.observe import Observed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.transforms.fold import spread


def _inverse_factors(layer: Layer, site: Site, factors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """1 / s of every input channel of ``site``, or None where nothing was folded."""
    return 1.0 / spread(layer, site, factors[site.name]) if site.name in factors else None


def folded_inputs(layer: Layer, site: Site, observed: Observed, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The original model's inputs as the folded layer's linears take them, x / s, one [tokens, columns] a sample."""
    inverse = _inverse_factors(layer, site, factors)
    inputs = observed.inputs[site.name]
    return inputs if inverse is None else [x * inverse.to(x.device) for x in inputs]


def folded_moments(layer: Layer, site: Site, observed: Observed, factors: dict[str, torch.Tensor]) -> Moments:
    """Second moments of the inputs that the folded layer's linears take, x / s, all of them the original model's."""
    hessian = observed.hessians[site.name]
    inverse = _inverse_factors(layer, site, factors)
    return Moments(hessian if inverse is None else hessian * inverse * inverse[:, None])
