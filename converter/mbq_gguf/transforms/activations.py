"""Activations as the products of W4A8 and W8A8 take them (docs/format.md): int8, one scale per token, found while the model runs or static.

For searches and trials: the model computes in floating point, and these linears are given what int8 keeps of their input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGEST = 127.0
SMALLEST_AMAX = 2.0**-95  # below it the kernels take a row for zeros: 127 / amax would leave float32


def int8_tokens(x: torch.Tensor, ranges: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., columns] quantised to int8 with the scale max|x| / 127 of each row, and back, in float32.

    A row with a static range, one of ``ranges`` [...] greater than 0, takes that for its max|x|; what lies beyond it is cut.
    """
    x = x.float()
    largest = torch.tensor(LARGEST, device=x.device)  # a tensor: a Python number would be multiplied by, as its reciprocal
    amax = x.abs().amax(dim=-1, keepdim=True)
    amax = torch.where(amax < SMALLEST_AMAX, 0.0, amax)
    if ranges is not None:
        amax = torch.where(ranges[..., None] > 0, ranges[..., None], amax)
    inverse = torch.where(amax > 0, largest / amax, 0.0)
    return (x * inverse).round_().clamp_(-LARGEST, LARGEST) * (amax / largest)


@contextmanager
def int8_inputs(modules: Iterable[nn.Linear], factors: torch.Tensor | float = 1.0, ranges: torch.Tensor | None = None) -> Iterator[None]:
    """While open, each of ``modules`` is given x / ``factors`` [columns] in int8, with static ``ranges`` [tokens] where they are given."""

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return int8_tokens(args[0] / factors, ranges).to(args[0])

    handles = [module.register_forward_pre_hook(hook) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
