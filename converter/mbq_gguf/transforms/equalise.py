"""Channel equalisation: the search for the factors s of y = Q(W diag(s)) (x / s) (AWQ, arXiv 2306.00978; MBQ, arXiv 2412.19509).

s = mean|x|^t over all tokens, at least 1e-4, divided by sqrt(max s * min s); t is tried at 0, 0.05 ... 0.95. The t wins whose rounded
weights change the inspected module's output least, on the container's own grid, from the original inputs. MBQ compares by L1 with answer
tokens counting 1, vision tokens the layer's ratio, prompt tokens 0, summed over tokens (so that token counts matter, as in the paper's
code); AWQ by L2 with all tokens alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mbq_gguf.calibration.observe import Call
from mbq_gguf.models.decoder import Group, linear
from mbq_gguf.transforms.fold import gather, repeats, spread

EXPONENTS = tuple(k / 20 for k in range(20))
SMALLEST_FACTOR = 1e-4

Rounder = Callable[[torch.Tensor], torch.Tensor]  # float32 weights [rows, columns] to the container's grid and back


@dataclass(frozen=True)
class Choice:
    """What the search found for one group: the exponent, its factors (one an output of the group's previous operation), and all losses."""

    exponent: float
    factors: torch.Tensor
    losses: tuple[float, ...]


def channel_factors(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """s of one exponent from mean|x| per channel, scaled so that its largest and smallest entries multiply to 1."""
    factors = mean_abs.float().pow(exponent).clamp(min=SMALLEST_FACTOR)
    return factors / (factors.max() * factors.min()).sqrt()


@torch.no_grad()
def search(
    layer: nn.Module, group: Group, mean_abs: torch.Tensor, calls: Sequence[Call], power: int, rounders: Sequence[Rounder]
) -> Choice | None:
    """The best of :data:`EXPONENTS` for ``group``; None where the layer's shapes do not allow the fold. ``layer`` is left as it was.

    ``mean_abs`` [columns] is over all tokens; ``power`` 1 or 2 is the norm of the loss; ``rounders`` are one a linear.
    """
    if repeats(layer, group) == 0:
        return None
    inspected = layer.get_submodule(group.inspected)
    linears = [linear(layer, name) for name in group.linears]
    original = [module.weight.detach().clone() for module in linears]
    shared = gather(layer, group, mean_abs)
    losses = []
    try:
        for exponent in EXPONENTS:
            factors = spread(layer, group, channel_factors(shared, exponent))
            for module, weight, rounder in zip(linears, original, rounders, strict=True):
                module.weight.copy_(rounder(weight * factors) / factors)
            losses.append(output_loss(inspected, calls, power))
    finally:
        for module, weight in zip(linears, original, strict=True):
            module.weight.copy_(weight)
    best = min(range(len(EXPONENTS)), key=losses.__getitem__)
    return Choice(EXPONENTS[best], channel_factors(shared, EXPONENTS[best]), tuple(losses))


def output_loss(module: nn.Module, calls: Sequence[Call], power: int) -> float:
    """Sum over calls, tokens and channels of weight * |output - reference| ** power, over the number of entries with weight."""
    total, entries = 0.0, 0
    for call in calls:
        out = module(*call.args, **call.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        error = (out[0] - call.output).abs_() if power == 1 else (out[0] - call.output).square_()
        total += float(torch.dot(error.sum(dim=1), call.weight))
        entries += int((call.weight > 0).sum()) * error.shape[1]
    return total / max(1, entries)
