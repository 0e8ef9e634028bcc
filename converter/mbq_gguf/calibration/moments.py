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
    """With x the input in the rounded model and y the original one: ``hessian`` = sum w x^T x, ``cross`` = sum w (y - x)^T x (None where
    nobody asks for it), both [columns, columns] float32 on the device."""

    hessian: torch.Tensor
    cross: torch.Tensor | None = None


class _ReachedError(Exception):
    """Ends a layer's run at the input that was wanted; the rest would be thrown away."""


@torch.no_grad()
def moments(
    rounded: nn.Module,
    index: int,
    prefix: Sequence[Streamed],
    group: Group,
    weights: TokenWeights,
    originals: Sequence[torch.Tensor] | None = None,
) -> Moments:
    """Moments of ``group``'s input when ``prefix`` enters layer ``index``, which is ``rounded`` up to this group.

    ``originals`` are the same inputs in the original model, one [tokens, columns] a stream; without them there are no cross moments.
    """
    found: Moments | None = None
    for number, stream in enumerate(prefix):
        x = group_input(rounded, index, stream, group)
        root = weights(stream, group).to(x.device).sqrt()[:, None]
        rooted = x * root  # both sides of the product alike, so that the sum is positive however it is rounded
        if found is None:
            square = x.new_zeros(x.shape[1], x.shape[1])
            found = Moments(square, None if originals is None else square.clone())
        found.hessian.addmm_(rooted.t(), rooted)
        if originals is not None and found.cross is not None:
            found.cross.addmm_(((originals[number].to(x) - x) * root).t(), rooted)
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
