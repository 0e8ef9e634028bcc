"""Products of weights with one scale per row: the same bits as the definition in ggml-row-scale.h, which is repeated here in numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbq_cbind import mul_mat as module
from mbq_cbind.graph import devices
from mbq_cbind.mul_mat import mul_mat
from mbq_cbind.types import Bytes, Floats

AMAX_MIN = np.float32(2.0**-95)
HEADER = Path(__file__).parents[2] / "ggml_patch" / "src" / "ggml" / "include" / "ggml-row-scale.h"
LOWEST = {"Q4_0": -8, "Q8_0": -128}
KINDS = pytest.mark.parametrize("kind", LOWEST)


def blocks(kind: str, codes: np.ndarray, scales: np.ndarray) -> Bytes:
    """Codes [..., rows, K] and one fp16 scale per row [..., rows] as the type's blocks, written from the layout."""
    grouped = codes.reshape(*codes.shape[:-1], -1, 32)
    if kind == "Q4_0":
        nibbles = (grouped + 8).astype(np.uint8)
        payload = nibbles[..., :16] | nibbles[..., 16:] << 4
    else:
        payload = grouped.astype(np.int8).view(np.uint8)
    scale_bytes = np.broadcast_to(scales.astype("<f2")[..., None, None], (*grouped.shape[:-1], 1)).copy().view(np.uint8)
    return np.concatenate([scale_bytes, payload], axis=-1).reshape(*codes.shape[:-1], -1)


def expected(codes: np.ndarray, scales: np.ndarray, x: Floats, ranges: Floats | None = None) -> Floats:
    """The contract. Sums run in float64, where integers below 2^53 are exact in any order."""
    amax = np.abs(x).max(-1, keepdims=True)
    if ranges is not None:
        amax = np.where(ranges[:, None] > 0, ranges[:, None], amax)
    small = amax < AMAX_MIN
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(small, np.float32(0), np.float32(127) / amax)
        q = np.rint(np.clip(x * inverse, -127, 127))
    scale = np.where(small, np.float32(0), amax / np.float32(127))
    total = q.astype(np.float64) @ np.swapaxes(codes, -1, -2).astype(np.float64)
    return total.astype(np.float32) * scales.astype(np.float16).astype(np.float32)[..., None, :] * scale


def case(kind: str, rows: int, columns: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Floats]:
    random = np.random.default_rng(seed)
    codes = random.integers(LOWEST[kind], -LOWEST[kind], (rows, columns))
    scales = (random.normal(size=rows) * 0.01).astype(np.float16)
    return codes, scales, random.normal(size=(n, columns)).astype(np.float32)


def check(kind: str, codes: np.ndarray, scales: np.ndarray, x: Floats, ranges: Floats | float | None = None, **options: object) -> None:
    data = blocks(kind, codes, scales)
    found = mul_mat(kind, data, codes.shape[-1], x, row_scale=True, ranges=ranges, **options)  # type: ignore[arg-type]
    each = np.full(x.shape[-2], ranges, np.float32) if isinstance(ranges, float) else ranges
    assert np.array_equal(found, expected(codes, scales, x, each))


def test_the_flag_is_the_headers() -> None:
    shift = re.search(r"GGML_TENSOR_FLAG_ROW_SCALE \(1 << (\d+)\)", HEADER.read_text())
    assert shift is not None
    assert 1 << int(shift.group(1)) == module.ROW_SCALE


@KINDS
@settings(max_examples=60)
@given(data=st.data())
def test_product_is_the_contracts(kind: str, data: st.DataObject) -> None:
    columns = 32 * data.draw(st.integers(2, 40) | st.sampled_from([112, 280, 592, 924]), "K / 32")
    rows, n = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 30), "columns")
    codes, scales, x = case(kind, rows, columns, n, data.draw(st.integers(0, 2**32 - 1), "seed"))
    x *= np.float32(2.0) ** data.draw(st.integers(-110, 100), "exponent")
    options = {"threads": st.integers(1, 3), "spacing": st.integers(0, 3), "reference": st.booleans()}
    check(kind, codes, scales, x, **{name: data.draw(values, name) for name, values in options.items()})


@KINDS
@pytest.mark.parametrize("n", [1, 2, 6, 7, 1024])
def test_many_columns(kind: str, n: int) -> None:
    check(kind, *case(kind, 35, 192, n))


@KINDS
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes_do_not_saturate(kind: str, sign: int) -> None:
    """All codes the lowest and all activations the largest: 29568 * 128 * 127 in a sum; then halves, which round to even."""
    codes = np.full((9, 29568), LOWEST[kind])
    x = np.full((7, 29568), sign, np.float32)
    check(kind, codes, np.ones(9), x)
    check(kind, codes, np.ones(9), x[:1])
    x[:, 1::2] = np.resize(np.arange(-126.5, 127) / 127, 29568 // 2)
    check(kind, codes, np.ones(9), x)


@KINDS
def test_zero_rows_and_huge_rows(kind: str) -> None:
    codes, scales, x = case(kind, 8, 96, 9)
    x[0], x[1], x[2], x[3] = 0, x[1] * np.float32(2.0**-97), x[2] * np.float32(1e30), -0.0
    check(kind, codes, scales, x)
    for row in range(9):
        check(kind, codes, scales, x[row : row + 1])


@KINDS
def test_broadcast_and_strides(kind: str) -> None:
    random = np.random.default_rng(1)
    codes = random.integers(LOWEST[kind], -LOWEST[kind], (2, 3, 17, 128))
    scales = random.normal(size=(2, 3, 17)).astype(np.float16)
    x = random.normal(size=(4, 6, 5, 128)).astype(np.float32)
    repeated = np.repeat(np.repeat(codes, 2, 0), 2, 1), np.repeat(np.repeat(scales, 2, 0), 2, 1)
    found = mul_mat(kind, blocks(kind, codes, scales), 128, x, row_scale=True, spacing=9)
    assert np.array_equal(found, expected(*repeated, x))


@KINDS
def test_a_batch_may_be_cut_anywhere(kind: str) -> None:
    codes, scales, x = case(kind, 33, 576, 13)
    data = blocks(kind, codes, scales)
    whole = mul_mat(kind, data, 576, x, row_scale=True)
    for cut in (1, 4, 6, 12):
        parts = [mul_mat(kind, data, 576, part, row_scale=True) for part in (x[:cut], x[cut:])]
        assert np.array_equal(np.concatenate(parts), whole)


def ranges_of(x: Floats, seed: int) -> Floats:
    """A range for each row, from a hundredth of its largest value to a hundred times that, and none for every third."""
    random = np.random.default_rng(seed)
    ranges = (np.abs(x).max(-1) * 10.0 ** random.uniform(-2, 2, len(x))).astype(np.float32)
    ranges[::3] = 0
    return ranges


@KINDS
@settings(max_examples=30)
@given(data=st.data())
def test_static_ranges_are_the_contracts(kind: str, data: st.DataObject) -> None:
    rows, n, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 30)), data.draw(st.integers(0, 2**32 - 1))
    codes, scales, x = case(kind, rows, 32 * data.draw(st.integers(1, 20)), n, seed)
    x *= np.float32(2.0) ** data.draw(st.integers(-80, 100), "exponent")
    check(kind, codes, scales, x, ranges_of(x, seed), threads=data.draw(st.integers(1, 3)), reference=data.draw(st.booleans()))


@KINDS
@settings(max_examples=30)
@given(data=st.data())
def test_one_range_of_all_rows_is_the_contracts(kind: str, data: st.DataObject) -> None:
    """As a vision tower has it; some rows lie beyond it, and some far within."""
    rows, n, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300)), data.draw(st.integers(0, 2**32 - 1))
    codes, scales, x = case(kind, rows, 32 * data.draw(st.integers(1, 20)), n, seed)
    x *= np.float32(10.0) ** np.random.default_rng(seed).uniform(-2, 2, (n, 1)).astype(np.float32)
    limit = data.draw(st.sampled_from([0.01, 1.0, 4.0, 1e30]))
    check(kind, codes, scales, x, limit, threads=data.draw(st.integers(1, 3)), reference=data.draw(st.booleans()))


@KINDS
def test_the_largest_value_as_range_is_the_dynamic_product(kind: str) -> None:
    codes, scales, x = case(kind, 9, 128, 70)
    data = blocks(kind, codes, scales)
    static = mul_mat(kind, data, 128, x, row_scale=True, ranges=np.abs(x).max(-1))
    assert np.array_equal(static, mul_mat(kind, data, 128, x, row_scale=True))


@KINDS
def test_values_far_beyond_a_range_are_cut_to_127(kind: str) -> None:
    codes, scales, x = case(kind, 9, 96, 5)
    x[:, ::2] *= np.float32(1e30)
    check(kind, codes, scales, x, np.full(5, 1e-20, np.float32))  # their products with 127 / range overflow


@KINDS
def test_the_reference_path_is_the_same_function(kind: str) -> None:
    check(kind, *case(kind, 5, 96, 3), reference=True)


@KINDS
def test_without_the_flag_it_is_the_stock_product(kind: str) -> None:
    """Activations are then rounded 32 at a time: a large one in the first block, where all codes are 0, costs the others nothing."""
    codes, scales, x = case(kind, 5, 96, 3)
    codes[:, :32], x[:, 0] = 0, 1e6
    data, weights = blocks(kind, codes, scales), codes * scales.astype(np.float64)[:, None]
    step = np.abs(x[:, 32:]).max() / 127
    error = np.abs(mul_mat(kind, data, 96, x) - x @ weights.T)
    assert np.all(error <= 0.6 * step * np.abs(weights).sum(-1))  # half a step, and the step's own rounding to fp16
    assert not mul_mat(kind, data, 96, x, row_scale=True).any()


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 33, 64, 127, 512])
@pytest.mark.parametrize("columns", [64, 576, 3584, 18944])
def test_product_on_cuda(kind: str, n: int, columns: int) -> None:
    assert "CUDA0" in devices()
    check(kind, *case(kind, 257, columns, n), device="CUDA0")


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("n", [1, 8, 65, 512])
@pytest.mark.parametrize("columns", [64, 576, 18944])
def test_static_ranges_on_cuda(kind: str, n: int, columns: int) -> None:
    codes, scales, x = case(kind, 257, columns, n)
    check(kind, codes, scales, x, ranges_of(x, n) * np.float32(n > 1) + np.float32(n == 1), device="CUDA0")  # the first row has none
    check(kind, codes, scales, x, 2.0, device="CUDA0")
