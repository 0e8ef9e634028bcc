"""ggml's stock quantisers through the bindings: shapes, round trips, and refused inputs."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from mbq_cbind import types
from mbq_cbind.errors import BindingError, CallError

WEIGHTS = np.random.default_rng(0).normal(size=(70, 512)).astype(np.float32)
STOCK = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S")


@pytest.mark.parametrize("name", STOCK)
def test_dequantize_equals_the_gguf_package(name: str) -> None:
    """An implementation of its own in numpy, so the bytes and the rows are where they should be."""
    packed = types.quantize(name, WEIGHTS)
    assert packed.shape == (70, types.row_bytes(name, 512))
    assert np.array_equal(types.dequantize(name, packed, 512), gguf_dequantize(packed, GGMLQuantizationType[name]))


def test_rows_are_independent() -> None:
    """Threads share the rows out; each row's bytes are those it has alone."""
    whole = types.quantize("Q4_K", WEIGHTS)
    assert np.array_equal(whole[[0, 63, 64, 69]], np.concatenate([types.quantize("Q4_K", WEIGHTS[i : i + 1]) for i in (0, 63, 64, 69)]))


def test_importance_lowers_the_error_where_it_is_high() -> None:
    importance = np.ones(512, np.float32)
    importance[::2] = 100
    error = {}
    for label, matrix in (("plain", None), ("weighted", importance)):
        back = types.dequantize("Q3_K", types.quantize("Q3_K", WEIGHTS, matrix), 512)
        error[label] = float(((back - WEIGHTS)[:, ::2] ** 2).mean())
    assert error["weighted"] < error["plain"]


def test_a_type_that_needs_importance_says_so() -> None:
    with pytest.raises(BindingError, match="importance matrix"):
        types.quantize("IQ2_XXS", WEIGHTS)


def test_unknown_type_lists_the_known() -> None:
    with pytest.raises(CallError, match=r"no type 'Q9_X'.*q4_0"):
        types.type_info("Q9_X")
    with pytest.raises(CallError, match="no type 4:"):  # an id that ggml has retired
        types.type_info(4)


def test_rows_must_fit_blocks() -> None:
    with pytest.raises(CallError, match="rows of 96 do not fit"):
        types.quantize("MBQ3", WEIGHTS[:, :96])


def test_data_must_have_the_size_of_its_rows() -> None:
    with pytest.raises(CallError, match="are 144 bytes"):
        types.dequantize("Q4_0", np.zeros((2, 100), np.uint8), 256)


def test_invalid_scales_are_found() -> None:
    packed = types.quantize("MBQ3", WEIGHTS[:1])
    assert types.is_valid("MBQ3", packed)
    packed[0, :2] = np.array([np.inf], "<f2").view(np.uint8)
    assert not types.is_valid("MBQ3", packed)


@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3S_64"])
def test_invalid_heads_are_found(kind: str) -> None:
    info = types.type_info(kind)
    packed = types.quantize(kind, WEIGHTS[:1])
    for place in (0, 2, packed.shape[1] - info.type_size + 2):  # of a scale word: both of the first block, the last of the row
        for word, valid in ((0x3DF << 6 | 63, True), (0x3E0 << 6, False), (0xFFFF, False)):  # 0x3E0: infinity
            changed = packed.copy()
            changed[0, place : place + 2] = np.array([word], "<u2").view(np.uint8)
            assert types.is_valid(kind, changed) is valid
