"""Equalise one decoder layer: search every group from the original inputs, then fold all choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from mbq_gguf.calibration.observe import Observed
from mbq_gguf.formats.registry import container_for
from mbq_gguf.models.decoder import GROUPS, LINEARS, Group, linear
from mbq_gguf.rounding.nearest import nearest_values
from mbq_gguf.transforms.equalise import Choice, search
from mbq_gguf.transforms.fold import fold


def search_layer(
    layer: nn.Module, observed: Observed, containers: Mapping[str, str], power: int, groups: Sequence[Group] = GROUPS
) -> dict[str, Choice]:
    """The choice of each of ``groups`` that the layer's shapes allow to fold, by group name; ``containers`` are by linear."""
    choices = {}
    for group in groups:
        kinds = [container_for(containers[name], linear(layer, name).in_features) for name in group.linears]
        mean_abs = observed.statistics[group.name].mean_abs
        rounders = [partial(nearest_values, container=kind) for kind in kinds]
        choice = search(layer, group, mean_abs, observed.calls[group.name], power, rounders)
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
