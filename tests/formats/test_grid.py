"""The torch grid against the quant types' own numpy code: equal, not just close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grids import grid_for
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mbq_gguf.formats import mbq3, mbq3s
from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import Floats, QuantType
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.rounding.nearest import nearest_values, round_nearest

EACH = pytest.mark.parametrize("kind", list(OWN.values()), ids=lambda kind: kind.name)


def check_equal(kind: QuantType, weights: Floats) -> None:
    data = kind.quantize(weights)
    rounded = round_nearest(torch.from_numpy(weights), kind)
    np.testing.assert_array_equal(rounded.data, data)
    expected = kind.dequantize(data)
    np.testing.assert_array_equal(rounded.weight.numpy(), expected)
    np.testing.assert_array_equal(nearest_values(torch.from_numpy(weights), kind).numpy(), expected)


@EACH
@given(
    weights=hnp.arrays(np.float32, (2, 256), elements=st.floats(-(2.0**126), 2.0**126, width=32)),
    scale=st.sampled_from([1.0, 1e-3, 1e-7, 1e-38]),
)
@settings(max_examples=60)
def test_equals_the_type_on_any_rows(kind: QuantType, weights: Floats, scale: float) -> None:
    check_equal(kind, (weights * np.float32(scale)).astype(np.float32))


@EACH
@pytest.mark.parametrize("size", [1e-9, 1e-5, 0.02, 1.0, 3e4, 5e37])
def test_equals_the_type_on_normal_rows(kind: QuantType, size: float) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    check_equal(kind, weights * np.float32(size))


@EACH
@given(
    weights=hnp.arrays(np.float32, (3, 256), elements=st.floats(-(2.0**15), 2.0**15, width=32)),
    size=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
)
@settings(max_examples=60)
def test_packs_what_the_type_packs(kind: QuantType, weights: Floats, size: float) -> None:
    expected, grid = kind.quantize(weights * np.float32(size)), grid_for(kind)
    unpack = mbq3s.unpack_blocks if grid.held_pair else mbq3.unpack_blocks
    codes, scale, minimum = (torch.from_numpy(part).view(3, -1) for part in unpack(expected.reshape(-1, kind.type_size)))
    packed = grid.packed(codes.float(), scale, minimum, torch.zeros(3, codes.shape[1] // grid.block, 2))
    np.testing.assert_array_equal(packed.numpy(), expected)


@EACH
def test_codes_by_hand(kind: QuantType) -> None:
    # Range 0 to 7, so scale 1 and minimum 0: 2.5 is a tie and goes to the even code 2, 3.5 to 4, 2.51 to 3.
    weights = torch.zeros(1, kind.block_size)
    weights[0, :5] = torch.tensor([7.0, 2.5, 3.5, 2.51, 6.4])
    assert nearest_values(weights, kind)[0, :5].tolist() == [7.0, 2.0, 4.0, 3.0, 6.0]


def test_types_whose_weights_lie_on_no_line_have_no_grid() -> None:
    for name in ("F16", "BF16", "IQ3_S", "IQ4_NL"):
        assert grid_of(quant_type(name)) is None
