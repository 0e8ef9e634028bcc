"""Equalises one decoder layer: searches the sites in order, then folds all choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mbq_gguf.calibration.calls import Entering, observed_calls
from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.formats.quant_type import QuantType
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.formats.row_scale import QUANT_TYPES as ROW_SCALED
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.models.lazy import ReadCache, materialised
from mbq_gguf.rounding.sequence import Refinement
from mbq_gguf.transforms.candidate import Rounder, by_gptq, by_nearest
from mbq_gguf.transforms.equalise import Choice, search
from mbq_gguf.transforms.fold import fold, repeats, spread

# GPTQ costs more than measuring the output, so it runs for fewer exponents, 9 on average. On the reference VLM the result is as good as
# with all 20; choosing by rounding to nearest instead ends 23 (L2) and 7 % (L1) above the least loss.
GPTQ_PATIENCE = 4


@dataclass(frozen=True)
class Criterion:
    """How candidates are compared: the weight of each token and the power of the error, on the first ``samples`` (None: all).

    ``gptq``: how weights will be rounded (None: to nearest); it needs ``hessians`` of the original inputs, by site name.
    """

    weights: TokenWeights
    power: int
    samples: int | None = None
    gptq: Refinement | None = None
    hessians: Mapping[str, torch.Tensor] | None = None

    def rounder(self, site: Site, kinds: Sequence[QuantType]) -> Rounder:
        """The rounder for the linears of ``site``, which get the types ``kinds``."""
        if self.gptq is None:
            return by_nearest(kinds)
        assert self.hessians is not None
        return by_gptq(kinds, self.hessians[site.name], self.gptq)


def search_layer(
    original: Entering, prefix: Entering | None, type_names: Mapping[str, str], criterion: Criterion, sites: Sequence[Site]
) -> dict[str, Choice]:
    """The choice for each of ``sites`` that can be folded, by site name; neither layer is changed.

    Sites are searched with their original inputs. With ``prefix``, the streams of the quantised model, the inputs come from the previous
    layers and sites after folding and rounding, and outputs are still compared with the original's (the authors' `distort`).
    """
    choices = {}
    rounded = None if prefix is None else replace(prefix, layer=prefix.layer.copy())
    for site in sites:
        if repeats(original.layer, site) == 0:
            continue
        calls, mean_abs = observed_calls(original, rounded, site, criterion.weights, criterion.samples)
        layer = (rounded or original).layer
        kinds = [quant_type_for(type_names[name], layer.linear(name).in_features) for name in site.readers]
        rounder, patience = criterion.rounder(site, kinds), None if criterion.gptq is None else GPTQ_PATIENCE
        int8 = all(kind.name in ROW_SCALED for kind in kinds)
        choice = search(layer, site, mean_abs, calls, criterion.power, rounder, patience, int8)
        assert choice is not None
        choices[site.name] = choice
        if rounded is not None:
            _settle(rounded.layer, site, choice, rounder)
    return choices


@torch.no_grad()
def _settle(layer: Layer, site: Site, choice: Choice, rounder: Rounder) -> None:
    """Fold ``choice`` into ``layer`` and round the site's linears, for the search of later sites."""
    fold(layer, site, choice.factors)
    linears = [layer.linear(name) for name in site.readers]
    inputs = spread(layer, site, choice.factors)
    for module, values in zip(linears, rounder([module.weight.detach() for module in linears], inputs), strict=True):
        module.weight.copy_(values)


def fold_layer(layer: Layer, factors: Mapping[str, torch.Tensor]) -> None:
    """Fold the factors of each site (by name) into ``layer``."""
    for site in layer.sites:
        if site.name in factors:
            fold(layer, site, factors[site.name].to(layer.device))


def other_parameters(layer: Layer) -> dict[str, torch.Tensor]:
    """Every parameter of ``layer`` that is no quantised linear's weight: norms and biases."""
    quantised = {f"{name}.weight" for name in layer.layout.linears}
    return {name: parameter.detach() for name, parameter in layer.module.named_parameters() if name not in quantised}


def changed(parameters: Mapping[str, torch.Tensor], stored: nn.Module) -> dict[str, torch.Tensor]:
    """Those of ``parameters``, on the host, that differ from those of the ``stored`` layer."""
    before, made = dict(stored.named_parameters()), ReadCache()
    return {
        name: parameter
        for name, parameter in parameters.items()
        if not torch.equal(parameter, materialised(before[name], parameter.device, parameter.dtype, made))
    }
