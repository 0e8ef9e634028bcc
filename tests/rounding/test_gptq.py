"""GPTQ against known results, and against rounding to nearest on the objective that it minimises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import grid_for
from mbq_gguf.formats.mbq3 import MBQ3, MBQ3_64
from mbq_gguf.formats.quant_type import QuantType
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.rounding.gptq import code_gptq, objective, round_gptq
from mbq_gguf.rounding.inverse import inverse_factor
from mbq_gguf.rounding.nearest import round_nearest

OWN = pytest.mark.parametrize("kind", [MBQ3, MBQ3_64], ids=lambda kind: kind.name)
COLUMNS = 256


def correlated_inputs(seed: int, tokens: int = 400) -> torch.Tensor:
    """Inputs [tokens, COLUMNS] that share a few directions and have outlier channels, like a decoder's."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 24, generator=draw) @ torch.randn(24, COLUMNS, generator=draw)
    x = shared + 0.3 * torch.randn(tokens, COLUMNS, generator=draw)
    x[:, ::37] *= 8
    return x


def weights(seed: int, rows: int = 48) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1000 + seed))


@OWN
def test_identity_hessian_is_round_to_nearest(kind: QuantType) -> None:
    weight = weights(0)
    rounded = round_gptq(weight, inverse_factor(torch.eye(COLUMNS), 0.01), grid_for(kind))
    np.testing.assert_array_equal(rounded.data, round_nearest(weight, kind).data)


@OWN
@pytest.mark.parametrize("seed", range(5))
def test_beats_nearest_on_its_own_objective(kind: QuantType, seed: int) -> None:
    x, weight = correlated_inputs(seed), weights(seed)
    hessian = x.t() @ x
    gptq = objective(weight, round_gptq(weight, inverse_factor(hessian, 0.01), grid_for(kind)).weight, hessian)
    nearest = objective(weight, round_nearest(weight, kind).weight, hessian)
    assert gptq < 0.5 * nearest  # measured 0.06 to 0.15 on such inputs


@OWN
def test_bytes_give_the_weights_back(kind: QuantType) -> None:
    x = correlated_inputs(9)
    rounded = round_gptq(weights(9), inverse_factor(x.t() @ x, 0.01), grid_for(kind))
    np.testing.assert_array_equal(kind.dequantize(rounded.data), rounded.weight.numpy())


@pytest.mark.parametrize("kind", ["MBQ3S", "Q3_K", "W4A8", "W8A8"])
def test_codes_of_a_byte_are_as_good_as_floats(kind: str) -> None:
    """W8A8's range is 254 wide, so int8 codes must not be shifted as such."""
    grid = grid_for(quant_type(kind))
    coded = code_gptq(weights(3), torch.eye(COLUMNS), grid)
    small, large = (replace(coded, codes=coded.codes.to(dtype)).rounded(grid) for dtype in (torch.int8, torch.float32))
    np.testing.assert_array_equal(small.data, large.data)
    assert torch.equal(small.weight, large.weight)


def test_factor_inverts_the_damped_hessian() -> None:
    x = correlated_inputs(2).double()
    hessian = x.t() @ x
    factor = inverse_factor(hessian, 0.02).double()
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert (factor.t() @ factor @ damped - torch.eye(COLUMNS)).abs().max() < 1e-4  # the factor is stored in float32


def test_two_columns_by_hand() -> None:
    # One block whose codes are 0 to 7 with scale 1. H couples columns 0 and 1 only: H = [[1, .5], [.5, 1]] there, so column 0's error e
    # moves column 1 by -e * U01 / U00 = e * 0.5: 2.4 is rounded to 2 (error 0.4), 3.35 becomes 3.55 and is rounded to 4.
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1], weight[0, 63] = 2.4, 3.35, 7.0
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 0.5
    rounded = round_gptq(weight, inverse_factor(hessian, 0.0), grid_for(MBQ3_64)).weight
    assert rounded[0, [0, 1, 63]].tolist() == [2.0, 4.0, 7.0]


def test_dead_channels_are_rounded_to_nearest() -> None:
    x, weight = correlated_inputs(3), weights(3)
    x[:, 5] = 0
    rounded = round_gptq(weight, inverse_factor(x.t() @ x, 0.01), grid_for(MBQ3_64))
    assert torch.isfinite(rounded.weight).all()
    assert (rounded.weight[:, 5] - weight[:, 5]).abs().max() < 1.0  # half a step of a unit-normal block of 64 is below 0.5
