"""Second moments of a group's inputs where the model before it is rounded already, with the original model's inputs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.stream import Streamed, run_layer, to_device
from mbq_gguf.models.decoder import Group


@dataclass
class Moments:
    """With x the input in the rounded model and y the original one: ``hessian`` = sum w x^T x, ``cross`` = sum w (y - x)^T x, both
    [columns, columns] float32 on the device."""

    hessian: torch.Tensor
    cross: torch.Tensor


class _ReachedError(Exception):
    """Ends a layer's run at the input that was wanted; the rest would be thrown away."""


@torch.no_grad()
def moments(
    original: nn.Module,
    rounded: nn.Module,
    index: int,
    originals: Sequence[Streamed],
    prefix: Sequence[Streamed],
    group: Group,
    weights: TokenWeights,
) -> Moments:
    """Moments of ``group``'s input in layer ``index``: ``original`` runs on ``originals``, ``rounded`` (up to this group) on ``prefix``."""
    found: Moments | None = None
    for before, after in zip(originals, prefix, strict=True):
        y, x = group_input(original, index, before, group), group_input(rounded, index, after, group)
        weighted = x * weights(after, group).to(x.device)[:, None]
        if found is None:
            found = Moments(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
        found.hessian.addmm_(x.t(), weighted)
        found.cross.addmm_((y - x).t(), weighted)
    assert found is not None
    return found


def group_input(layer: nn.Module, index: int, stream: Streamed, group: Group) -> torch.Tensor:
    """What the linears of ``group`` are given [tokens, columns] float32 when ``stream`` enters ``layer``; the run ends there."""
    device = next(layer.parameters()).device
    seen: list[torch.Tensor] = []

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise _ReachedError

    # Last of the module's hooks, so that an online transform before it has run already.
    handle = layer.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
    try:
        run_layer(layer, stream.hidden.to(device), to_device(stream.kwargs[index], device))
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0][0].float()
