"""Converts inputs and their second moments from a layer before folding to the layer after folding."""

from __future__ import annotations

import torch

from mbq_gguf.calibration.moments import Moments
from mbq_gguf.calibration.observe import Observed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.transforms.fold import spread


def _inverse_factors(layer: Layer, site: Site, factors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """1 / s for every input channel of ``site``, or None if nothing was folded."""
    return 1.0 / spread(layer, site, factors[site.name]) if site.name in factors else None


def folded_originals(layer: Layer, site: Site, observed: Observed, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The original model's activations for the folded layer, [tokens, columns] per sample: inputs x become x / s; outputs of a
    :meth:`Layer.narrow_writer` do not change."""
    inverse = None if layer.narrow_writer(site) else _inverse_factors(layer, site, factors)
    originals = observed.originals[site.name]
    return originals if inverse is None else [x * inverse.to(x.device) for x in originals]


def folded_moments(layer: Layer, site: Site, observed: Observed, factors: dict[str, torch.Tensor]) -> Moments:
    """Second moments of the folded layer's inputs x / s, in the original model."""
    hessian = observed.hessians[site.name]
    inverse = _inverse_factors(layer, site, factors)
    return Moments(hessian if inverse is None else hessian * inverse * inverse[:, None])
