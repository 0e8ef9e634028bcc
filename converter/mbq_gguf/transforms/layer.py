"""Equalise one decoder layer: search every group from the original inputs, then fold all choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mbq_gguf.calibration.observe import Observed
from mbq_gguf.formats.registry import container_for
from mbq_gguf.models.decoder import GROUPS, LINEARS, Group, linear
from mbq_gguf.rounding.sequence import Refinement
from mbq_gguf.transforms.candidate import by_gptq, by_nearest
from mbq_gguf.transforms.equalise import Choice, search
from mbq_gguf.transforms.fold import fold

# Rounding by GPTQ costs more than a look at the output, so fewer of both: 9 exponents on average. On the reference VLM they choose as well
# as all 20 with 32 samples do, on other samples 0.2 % (L2) and 0.3 % (L1) above the least loss; what suits nearest rounding is 23 and 7 %.
GPTQ_PATIENCE = 4
GPTQ_SAMPLES = 8


def search_layer(
    layer: nn.Module,
    observed: Observed,
    containers: Mapping[str, str],
    power: int,
    gptq: Refinement | None,
    groups: Sequence[Group] = GROUPS,
) -> dict[str, Choice]:
    """The choice of each of ``groups`` that the layer's shapes allow to fold, by group name; ``containers`` are by linear.

    ``gptq`` says how weights will be rounded (None: to nearest); the original inputs' Hessians are needed then.
    """
    choices = {}
    for group in groups:
        kinds = [container_for(containers[name], linear(layer, name).in_features) for name in group.linears]
        statistics, calls = observed.statistics[group.name], observed.calls[group.name]
        if gptq is None:
            choice = search(layer, group, statistics.mean_abs, calls, power, by_nearest(kinds))
        else:
            assert statistics.hessian is not None
            rounder = by_gptq(kinds, statistics.hessian, gptq)
            choice = search(layer, group, statistics.mean_abs, calls, power, rounder, GPTQ_PATIENCE)
        if choice is not None:
            choices[group.name] = choice
    return choices


def fold_layer(layer: nn.Module, factors: Mapping[str, torch.Tensor]) -> None:
    """Fold the factors of each group (by name) into ``layer``."""
    for group in GROUPS:
        if group.name in factors:
            fold(layer, group, factors[group.name].to(next(layer.parameters()).device))


def changed_parameters(layer: nn.Module, stored: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of ``layer`` that is no quantised linear's weight and differs from ``stored``'s: norms and biases."""
    quantised = {f"{name}.weight" for name in LINEARS}
    before = dict(stored.named_parameters())
    return {
        name: parameter.detach().clone()
        for name, parameter in layer.named_parameters()
        if name not in quantised and not torch.equal(parameter, before[name])
    }
