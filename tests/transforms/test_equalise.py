"""The search against a loss computed by hand, and its choice on a layer made for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from mbq_gguf.calibration.calls import Call, Entering
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.calibration.observe import observe
from mbq_gguf.calibration.stream import capture, working_layer
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.rounding.sequence import Refinement, round_in_order
from mbq_gguf.transforms.candidate import Rounder, by_gptq, by_nearest
from mbq_gguf.transforms.equalise import EXPONENTS, channel_factors, output_loss, search
from mbq_gguf.transforms.fold import fold
from mbq_gguf.transforms.layer import GPTQ_PATIENCE, Criterion, search_layer
from torch import nn

PLAIN = Refinement(damping=0.01, clip=False, error_correction=0.0, refits=0)
PRODUCTS = 0.15  # of a loss: what products in bfloat16 add, measured 0.11


def test_exponents_are_the_papers() -> None:
    assert len(EXPONENTS) == 20
    assert EXPONENTS[0] == 0.0
    assert EXPONENTS[-1] == 0.95


def test_factors_by_hand() -> None:
    # sqrt gives 2, 1, 4 (and 1e-4 for a dead channel); divided by sqrt(4 * 1e-4) = 0.02.
    factors = channel_factors(torch.tensor([4.0, 1.0, 16.0, 0.0]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([100.0, 50.0, 200.0, 0.005]))
    torch.testing.assert_close(channel_factors(torch.tensor([4.0, 1.0]), 0.0), torch.ones(2))


def test_loss_is_a_sum_over_tokens_of_both_modalities() -> None:
    # Outputs differ from the reference by 1, 2 and 4 on three tokens of two channels: answer, vision, prompt.
    module = nn.Linear(2, 2, bias=False)
    module.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]])
    call = Call((x,), {}, torch.zeros(3, 2), torch.tensor([1.0, 0.5, 0.0]))
    module.requires_grad_(False)
    assert output_loss(module, [call], 1) == pytest.approx((2 * 1 + 0.5 * 2 * 2) / 4)  # entries of weighted tokens: 2 * 2
    assert output_loss(module, [call], 2) == pytest.approx((2 * 1 + 0.5 * 2 * 4) / 4)


@pytest.mark.parametrize("gptq", [None, PLAIN], ids=["nearest", "gptq"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("propagate_error", [False, True])
def test_search_leaves_the_layer_and_takes_the_least_loss(
    tiny: LoadedModel, samples: list[Sample], power: int, gptq: Refinement | None, propagate_error: bool
) -> None:
    layer = working_layer(tiny, 1)
    before = {name: value.clone() for name, value in layer.module.state_dict().items()}
    weights = uniform if power == 2 else modality({"attention": [0.5] * 3, "mlp": [0.5] * 3}, 1)
    streams = list(capture(tiny, samples))
    hessians = observe(layer, list(capture(tiny, samples)), hessian_weights=uniform).hessians if gptq else None
    entering = Entering(layer, streams)
    choices = search_layer(
        entering,
        entering if propagate_error else None,
        dict.fromkeys(STANDARD.readers, "MBQ3"),
        Criterion(weights, power, 2, gptq, hessians),
        layer.sites,
    )
    assert set(choices) == {"qkv", "o", "gate_up", "down"}
    for choice in choices.values():
        best = EXPONENTS.index(choice.exponent)
        assert len(choice.losses) == (min(best + GPTQ_PATIENCE + 1, len(EXPONENTS)) if gptq else len(EXPONENTS))
        assert choice.losses[best] == min(choice.losses)
    for name, value in layer.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_search_finds_the_outlier_channel(tiny: LoadedModel) -> None:
    # One input channel is 100 times the others: protecting it must beat leaving the weights as they are.
    layer, site = working_layer(tiny, 0), STANDARD.sites[3]
    module = layer.linear("mlp.down_proj")
    x = torch.randn(1, 64, module.in_features, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 100
    call = Call((x,), {}, module(x)[0].detach(), torch.ones(64))
    kind = quant_type_for("MBQ3", module.in_features)
    choice = search(layer, site, x[0].abs().mean(0), [call], 2, by_nearest([kind]))
    assert choice is not None
    assert choice.exponent > 0
    assert min(choice.losses) < 0.5 * choice.losses[0]


def rounder_by_shrinking(shares: dict[float, float]) -> Rounder:
    """Gives the weights of an exponent back times 1 - its share: the loss is a square of that, whatever the factors."""
    remaining = iter(EXPONENTS)

    def rounded(weights: Sequence[torch.Tensor], _factors: torch.Tensor) -> list[torch.Tensor]:
        share = shares.get(next(remaining), 1.0)
        return [weight * (1 - share) for weight in weights]

    return rounded


@pytest.mark.parametrize(("patience", "tried", "exponent"), [(None, 20, 0.9), (4, 6, 0.05), (2, 4, 0.05), (17, 20, 0.9)])
def test_search_ends_when_patience_does(tiny: LoadedModel, patience: int | None, tried: int, exponent: float) -> None:
    layer, site = working_layer(tiny, 0), STANDARD.sites[3]
    module = layer.linear("mlp.down_proj")
    x = torch.ones(1, 4, module.in_features)
    call = Call((x,), {}, module(x)[0].detach(), torch.ones(4))
    shares = {0.0: 0.5, 0.05: 0.4, 0.1: 0.45, 0.3: 0.41, 0.9: 0.1}
    choice = search(layer, site, x[0].mean(0), [call], 2, rounder_by_shrinking(shares), patience)
    assert choice is not None
    assert (len(choice.losses), choice.exponent) == (tried, exponent)
    assert choice.losses[1] / choice.losses[0] == pytest.approx((0.4 / 0.5) ** 2, rel=1e-2)


def test_choice_is_judged_by_the_rounding_that_follows(tiny: LoadedModel) -> None:
    # Inputs of four dimensions: GPTQ moves most errors where they do not show, so outliers need less protection than nearest rounding
    # gives them. The reported loss is that of the layer once it is folded and rounded.
    layer, site = working_layer(tiny, 0), STANDARD.sites[3]
    module = layer.linear("mlp.down_proj")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 4, generator=generator) @ torch.randn(4, module.in_features, generator=generator)
    x += 0.05 * torch.randn(x.shape, generator=generator)
    x[..., ::16] *= 10
    call, hessian = Call((x,), {}, module(x)[0].detach(), torch.ones(512)), x[0].t() @ x[0]
    kinds = [quant_type_for("MBQ3", module.in_features)]
    nearest = search(layer, site, x[0].abs().mean(0), [call], 2, by_nearest(kinds))
    gptq = search(layer, site, x[0].abs().mean(0), [call], 2, by_gptq(kinds, hessian, PLAIN))
    assert nearest is not None
    assert gptq is not None
    assert gptq.exponent < nearest.exponent
    assert min(gptq.losses) < 0.8 * gptq.losses[EXPONENTS.index(nearest.exponent)]

    factors = gptq.factors  # one an input of down_proj
    fold(layer, site, factors)
    moments = Moments(hessian / factors / factors[:, None])
    round_in_order(layer, dict.fromkeys(STANDARD.readers, "MBQ3"), lambda of: moments if of is site else None, PLAIN)
    followed = output_loss(module, [Call((x / factors,), {}, call.output, call.weight)], 2)
    assert followed == pytest.approx(min(gptq.losses), rel=PRODUCTS)
