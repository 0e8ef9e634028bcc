"""Scale words of MBQ3S: golden bytes, and the values that they can represent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.formats.mbq3 import MBQ3
from mbq_gguf.formats.mbq3s import MBQ3S, MBQ3S_64, nearest_parameters, pack_blocks, unpack_blocks
from mbq_gguf.formats.quant_type import QuantType

BOTH = pytest.mark.parametrize("kind", [MBQ3S, MBQ3S_64], ids=lambda kind: kind.name)


def test_golden_block() -> None:
    # Half 0: 0 to 7, so d = 1 (fp16 0x3C00, upper bits 0x1E0) and z = 0. Half 1: -1.75 to 1.75, d = 0.5 (0x3800, 0x1C0), z = 3.5 * 8 = 28.
    weights = np.zeros((1, 64), np.float32)
    weights[0, :8] = np.arange(8)
    weights[0, 32:40] = np.arange(8) / 2 - 1.75
    data = MBQ3S_64.quantize(weights)
    # The tie 3.5 of the zeros in half 1 goes to code 4. Codes of planes 0 to 3, byte 0: 0, 0, 0, 4; the planes' high bits lie in qh.
    words = (0x1E0 << 6, 0x1C0 << 6 | 28)
    assert data[0, :4].tobytes() == np.array(words, "<u2").tobytes()
    ql = [code & 3 | (code & 3) << 4 for code in range(8)] + [0] * 8
    assert data[0, 4:20].tolist() == ql
    # qh: plane 0 first half bit 2, plane 2 first half bit 6, second half bit 7; plane 3 first half bit 0, second half bit 1.
    four_up = [0b1000_0011 if code < 4 else 0b1100_0111 for code in range(8)]
    assert data[0, 20:].tolist() == four_up
    expected = weights.copy()
    expected[0, 40:] = 0.5 * (4 - 3.5)
    np.testing.assert_array_equal(MBQ3S_64.dequantize(data), expected)


@BOTH
@given(word=st.integers(0, 0x3DF << 6 | 63), code=st.integers(0, 7))
def test_every_scale_word_goes_there_and_back(kind: QuantType, word: int, code: int) -> None:
    packed = np.zeros((1, kind.type_size), np.uint8)
    packed[0, :4] = np.array([word, word], "<u2").view(np.uint8)
    codes, scale, minimum = unpack_blocks(packed)
    assert scale[0, 0] == np.array([word >> 6 << 5], np.uint16).view(np.float16)[0]
    assert minimum[0, 0] == -scale[0, 0] * (word & 63) / 8
    codes[:] = code
    again = pack_blocks(codes, scale, minimum)
    if scale[0, 0] > 0:  # a zero point of nothing is not kept
        assert again[0, :4].tobytes() == packed[0, :4].tobytes()
    assert (unpack_blocks(again)[0] == code).all()
    held = nearest_parameters(scale, minimum)
    np.testing.assert_array_equal(held[0], scale)
    np.testing.assert_array_equal(held[1], minimum)


@BOTH
def test_half_as_large_groups_halve_nothing_but_the_error(kind: QuantType) -> None:
    weights = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    error = np.square(kind.dequantize(kind.quantize(weights)) - weights).mean()
    whole = np.square(MBQ3.dequantize(MBQ3.quantize(weights)) - weights).mean()
    assert error < 0.85 * whole  # groups of 64 or 32 normal weights instead of 128; measured 0.83 and 0.62


@BOTH
def test_groups_that_do_not_reach_zero_lose_codes_but_not_weights(kind: QuantType) -> None:
    weights = np.random.default_rng(1).uniform(3.0, 4.0, (4, 256)).astype(np.float32)
    step = 4.0 / 7
    assert (
        np.abs(kind.dequantize(kind.quantize(weights)) - weights).max() <= step / 2 + 4.0 / 64
    )  # and what rounding the scale moves a code of 7
