"""Equalise one decoder layer: search group after group, then fold all choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mbq_gguf.calibration.calls import Entering, observed_calls
from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.formats.registry import container_for
from mbq_gguf.models.decoder import GROUPS, LINEARS, Group, linear
from mbq_gguf.rounding.sequence import Refinement
from mbq_gguf.transforms.candidate import Rounder, by_gptq, by_nearest
from mbq_gguf.transforms.equalise import Choice, search
from mbq_gguf.transforms.fold import fold, repeats, spread

# Rounding by GPTQ costs more than a look at the output, so fewer of them: 9 exponents on average. On the reference VLM they choose as well
# as all 20 do; what suits nearest rounding is 23 (L2) and 7 % (L1) above the least loss.
GPTQ_PATIENCE = 4


@dataclass(frozen=True)
class Judge:
    """How candidates are compared: the weight of each token and the power of the error, on the first ``samples`` (None: all).

    ``gptq`` says how weights will be rounded (None: to nearest) and needs ``hessians``, by group name, of the original inputs.
    """

    weights: TokenWeights
    power: int
    samples: int | None = None
    gptq: Refinement | None = None
    hessians: Mapping[str, torch.Tensor] | None = None

    def rounder(self, layer: nn.Module, group: Group, containers: Mapping[str, str]) -> Rounder:
        """How the linears of ``group`` are rounded; ``containers`` are by linear."""
        kinds = [container_for(containers[name], linear(layer, name).in_features) for name in group.linears]
        if self.gptq is None:
            return by_nearest(kinds)
        assert self.hessians is not None
        return by_gptq(kinds, self.hessians[group.name], self.gptq)


def search_layer(
    original: Entering, prefix: Entering | None, containers: Mapping[str, str], judge: Judge, groups: Sequence[Group] = GROUPS
) -> dict[str, Choice]:
    """The choice of each of ``groups`` that the layer's shapes allow to fold, by group name; both layers are left as they were.

    Each group is searched from its original inputs. With ``prefix``, the streams of the rounded model, inputs are what the layers before
    and the groups before give once they are folded and rounded, and still compared with the original's outputs (the authors' `distort`).
    """
    choices = {}
    rounded = None if prefix is None else replace(prefix, layer=copy.deepcopy(prefix.layer))
    for group in groups:
        if repeats(original.layer, group) == 0:
            continue
        calls, mean_abs = observed_calls(original, rounded, group, judge.weights, judge.samples)
        layer = (rounded or original).layer
        rounder = judge.rounder(layer, group, containers)
        choice = search(layer, group, mean_abs, calls, judge.power, rounder, None if judge.gptq is None else GPTQ_PATIENCE)
        assert choice is not None
        choices[group.name] = choice
        if rounded is not None:
            _settle(rounded.layer, group, choice, rounder)
    return choices


@torch.no_grad()
def _settle(layer: nn.Module, group: Group, choice: Choice, rounder: Rounder) -> None:
    """Fold ``choice`` into ``layer`` and round the group's linears."""
    fold(layer, group, choice.factors)
    linears = [linear(layer, name) for name in group.linears]
    inputs = spread(layer, group, choice.factors)
    for module, values in zip(linears, rounder([module.weight.detach() for module in linears], inputs), strict=True):
        module.weight.copy_(values)


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
