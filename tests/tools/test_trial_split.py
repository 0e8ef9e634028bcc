"""tools/trial_split.py: its transforms preserve a product except for rounding, and the split and the signs work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trial_split
from click.testing import CliRunner
from torch import nn
from trial_split import VARIANTS, Bits, product_of


@pytest.fixture
def linear() -> nn.Linear:
    """Weights whose rows have a mean, so that the sum of all inputs is by far the largest channel of a Hadamard transform."""
    torch.manual_seed(0)
    module = nn.Linear(80, 48)
    module.weight.data = torch.randn(48, 80) + 2
    return module


def error(module: nn.Linear, variant: str, bits: Bits, block: int = 80) -> float:
    product = product_of(module, variant, bits, block)
    x = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))
    product(module, (x,), module(x))
    return product.error


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [80, 16])
def test_the_product_is_the_linears(variant: str, block: int, linear: nn.Linear) -> None:
    """With 16 bits each, half a step of 2^15 of the largest of 80 values."""
    assert error(linear, variant, Bits(16, 16, searched=False), block) < 1e-3


def test_the_first_channel_spoils_the_rest_unless_split_or_signed(linear: nn.Linear) -> None:
    _, plain, split, signs = (error(linear, variant, Bits(4, 8, searched=False)) for variant in VARIANTS)
    assert plain > 1.5 * max(split, signs)


def test_a_search_only_helps(linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    errors = [(trial_split.rounded_weights(weight, Bits(4, 8, searched)) - weight).square().sum(-1) for searched in (False, True)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()


def test_a_run(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_split, "VARIANTS", VARIANTS[:2])
    monkeypatch.setattr(trial_split, "BITS", trial_split.BITS[2:])
    result = CliRunner().invoke(trial_split.main, [str(tiny_dir), "--questions", "1"])
    assert result.exit_code == 0, result.output
    assert "tower's fc2" in result.output
