"""Channel equalisation: the search for the factors s of y = Q(W diag(s)) (x / s) (AWQ, arXiv 2306.00978; MBQ, arXiv 2412.19509).

s = mean|x|^t over all tokens, at least 1e-4, divided by sqrt(max s * min s), with t = 0, 0.05 ... 0.95. The search selects the t whose
rounded weights, on the quant type's own grid, change the inspected module's output least. MBQ compares by L1, with weight 1 for answer
tokens, the layer's ratio for vision tokens and 0 for prompt tokens, summed over tokens (so that token counts matter, as in the paper's
code); or by L2, with means over the tokens of each modality. AWQ compares by L2 or L1 with equal weights.

Candidates are rounded in the same way as the final weights, to nearest (as in the papers) or by GPTQ, because factors that suit one suit
the other badly. GPTQ's own objective cannot replace the comparison, since it ignores how softmax and gate propagate an error. docs/log.md
has the regrets of these criteria.

For products with int8 activations (W4A8, W8A8), a candidate is Q(W diag(s)) applied to x / s in int8, as in MBQ's code: factors that suit
only the weights may leave the activations hard to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mbq_gguf.calibration.calls import Call
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.transforms.activations import int8_inputs
from mbq_gguf.transforms.candidate import Rounder
from mbq_gguf.transforms.fold import gather, repeats, spread

EXPONENTS = tuple(k / 20 for k in range(20))
SMALLEST_FACTOR = 1e-4


@dataclass(frozen=True)
class Choice:
    """The result of the search for one site: the exponent, its factors (one per output of the site's absorber), and the losses of all
    exponents tried."""

    exponent: float
    factors: torch.Tensor
    losses: tuple[float, ...]


def channel_factors(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """s for one exponent, from mean|x| per channel, scaled so that the product of its largest and smallest entries is 1."""
    factors = mean_abs.float().pow(exponent).clamp(min=SMALLEST_FACTOR)
    return factors / (factors.max() * factors.min()).sqrt()


@torch.no_grad()
def search(
    layer: Layer,
    site: Site,
    mean_abs: torch.Tensor,
    calls: Sequence[Call],
    power: int,
    rounder: Rounder,
    patience: int | None = None,
    int8: bool = False,
) -> Choice | None:
    """The best of :data:`EXPONENTS` for ``site``; None if the layer's shapes do not allow folding. ``layer`` is restored afterwards.

    ``mean_abs`` [columns] is over all tokens; ``power`` 1 or 2 is the norm of the loss. The search ends after ``patience`` exponents in a
    row without improvement. With ``int8`` the site's linears read int8 activations.
    """
    if repeats(layer, site) == 0:
        return None
    inspected = layer.part(site.inspected)
    linears = [layer.linear(name) for name in site.readers]
    original = [module.weight.detach().clone() for module in linears]
    shared = gather(layer, site, mean_abs)
    losses: list[float] = []
    best = 0
    try:
        for number, exponent in enumerate(EXPONENTS):
            factors = spread(layer, site, channel_factors(shared, exponent))
            rounded = rounder([weight * factors for weight in original], factors)
            for module, values in zip(linears, rounded, strict=True):
                module.weight.copy_(values if int8 else values / factors)
            # bfloat16 is no more precise than int8 here
            with int8_inputs((layer.holder(name) for name in site.readers), factors) if int8 else coarse_products(layer.device):
                losses.append(output_loss(inspected, calls, power))
            best = min(best, number, key=losses.__getitem__)
            if number - best == patience:
                break
    finally:
        for module, weight in zip(linears, original, strict=True):
            module.weight.copy_(weight)
    return Choice(EXPONENTS[best], channel_factors(shared, EXPONENTS[best]), tuple(losses))


def output_loss(module: nn.Module, calls: Sequence[Call], power: int) -> float:
    """Sum over calls, tokens and channels of weight * |output - reference| ** power, divided by the number of weighted entries."""
    device = next(module.parameters()).device
    total, entries = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for call in calls:
        error, weight = call.run(module).float(), call.weight.to(device)
        error -= call.output.to(device)
        error = error.abs_() if power == 1 else error.square_()
        total += torch.dot(error.sum(dim=1), weight)
        entries += (weight > 0).sum() * error.shape[1]
    return float(total) / max(1, int(entries))  # read once, because each read waits for the GPU
