"""The search against a loss worked out by hand, and its choice on a layer made for it."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.observe import Call, observe
from mbq_gguf.calibration.stream import capture, working_layer
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.formats.registry import container_for
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.decoder import GROUPS, LINEARS, linear
from mbq_gguf.rounding.nearest import nearest_values
from mbq_gguf.transforms.equalise import EXPONENTS, channel_factors, output_loss, search
from mbq_gguf.transforms.layer import search_layer
from torch import nn


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


@pytest.mark.parametrize("power", [1, 2])
def test_search_leaves_the_layer_and_beats_exponent_zero(tiny: LoadedModel, samples: list[Sample], power: int) -> None:
    layer = working_layer(tiny, 1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weights = uniform if power == 2 else modality({"attention": [0.5] * 3, "mlp": [0.5] * 3}, 1)
    observed = observe(layer, 1, list(capture(tiny, samples)), hessian_weights=None, call_weights=weights, call_samples=2)
    assert len(observed.calls["qkv"]) == 2
    choices = search_layer(layer, observed, dict.fromkeys(LINEARS, "MBQ3"), power)
    assert set(choices) == {"qkv", "o", "gate_up", "down"}
    for choice in choices.values():
        assert len(choice.losses) == len(EXPONENTS)
        assert choice.losses[EXPONENTS.index(choice.exponent)] == min(choice.losses)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_search_finds_the_outlier_channel(tiny: LoadedModel) -> None:
    # One input channel is 100 times the others: protecting it must beat leaving the weights as they are.
    layer, group = working_layer(tiny, 0), GROUPS[3]
    module = linear(layer, "mlp.down_proj")
    x = torch.randn(1, 64, module.in_features, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 100
    call = Call((x,), {}, module(x)[0].detach(), torch.ones(64))
    kind = container_for("MBQ3", module.in_features)
    choice = search(layer, group, x[0].abs().mean(0), [call], 2, [lambda weight: nearest_values(weight, kind)] * len(group.linears))
    assert choice is not None
    assert choice.exponent > 0
    assert min(choice.losses) < 0.5 * choice.losses[0]
