"""Simulates the int8 activations of W4A8 and W8A8 (docs/format.md): one scale per token, dynamic or static.

For searches and experiments: the model computes in floating point, and the inputs of chosen linears are rounded to int8 and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGEST = 127.0
SMALLEST_AMAX = 2.0**-95  # below it the kernels treat a row as zeros, since 127 / amax would overflow float32


def int8_tokens(x: torch.Tensor, ranges: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., columns] quantised to int8 and back, in float32, with scale max|x| / 127 per row.

    For rows with a static range, an entry of ``ranges`` [...] greater than 0, it replaces max|x|, and values beyond it are clipped.
    """
    x = x.float()
    largest = torch.tensor(LARGEST, device=x.device)  # a tensor, because CUDA would multiply by the reciprocal of a Python number
    amax = x.abs().amax(dim=-1, keepdim=True)
    amax = torch.where(amax < SMALLEST_AMAX, 0.0, amax)
    if ranges is not None:
        amax = torch.where(ranges[..., None] > 0, ranges[..., None], amax)
    inverse = torch.where(amax > 0, largest / amax, 0.0)
    return (x * inverse).round_().clamp_(-LARGEST, LARGEST) * (amax / largest)


@contextmanager
def int8_inputs(modules: Iterable[nn.Linear], factors: torch.Tensor | float = 1.0, ranges: torch.Tensor | None = None) -> Iterator[None]:
    """Give each of ``modules`` x / ``factors`` [columns] rounded to int8 in the block, with static ``ranges`` [tokens], if any."""

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return int8_tokens(args[0] / factors, ranges).to(args[0])

    handles = [module.register_forward_pre_hook(hook) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
