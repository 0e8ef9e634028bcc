"""Channel factors folded into weights: the next linears take them, the operation before takes their inverse, the function stays.

y = W x = (W diag(s)) (x / s). The 1 / s goes into a norm's weight (and bias), or into the rows (and bias) of the linear that made x: v_proj
through the attention average, up_proj through the product with the gate.
"""

from __future__ import annotations

import torch
from torch import nn

from mbq_gguf.models.decoder import Group, linear, norm_offset


def repeats(layer: nn.Module, group: Group) -> int:
    """How many input channels of the group's linears share one factor: the query heads of a key/value head for o_proj, else 1.

    0 where the shapes do not allow the fold.
    """
    previous = layer.get_submodule(group.previous)
    if not isinstance(previous, nn.Linear):
        return 1
    columns = linear(layer, group.linears[0]).in_features
    return columns // previous.out_features if columns % previous.out_features == 0 else 0


def spread(layer: nn.Module, group: Group, factors: torch.Tensor) -> torch.Tensor:
    """One factor an output of ``group.previous`` to one an input channel of the group's linears.

    With grouped queries, query head h reads value head h // repeats, so each value head's factors come ``repeats`` times in a row.
    """
    times = repeats(layer, group)
    if times == 1:
        return factors
    return factors.view(-1, head_dim(layer)).repeat_interleave(times, dim=0).reshape(-1)


def gather(layer: nn.Module, group: Group, values: torch.Tensor) -> torch.Tensor:
    """The mean of ``values`` (one an input channel) over the channels that share a factor; the counterpart of :func:`spread`."""
    times = repeats(layer, group)
    if times == 1:
        return values
    return values.view(-1, times, head_dim(layer)).mean(dim=1).reshape(-1)


def head_dim(layer: nn.Module) -> int:
    """Channels of one attention head."""
    value = layer.get_submodule("self_attn").head_dim
    assert isinstance(value, int)
    return value


@torch.no_grad()
def fold(layer: nn.Module, group: Group, factors: torch.Tensor) -> None:
    """Fold ``factors`` (one an output of ``group.previous``) into ``layer``, in place and in its dtype."""
    previous = layer.get_submodule(group.previous)
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
    inputs = spread(layer, group, factors)
    for name in group.linears:
        linear(layer, name).weight.mul_(inputs)
