"""W4A8 and W8A8: Q4_0 and Q8_0 blocks that any ggml reads, with one scale per row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grids import grid_for
from mbq_cbind import types
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.grid import Grid
from mbq_gguf.formats.quant_type import Floats
from mbq_gguf.formats.registry import quant_type, quant_type_for
from mbq_gguf.rounding.gptq import code_gptq, objective, round_gptq
from mbq_gguf.rounding.inverse import inverse_factor
from mbq_gguf.rounding.ranges import search_range

KINDS = pytest.mark.parametrize("kind", list(row_scale.ROW_SCALES))


def weights(rows: int, columns: int, seed: int = 0) -> Floats:
    return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, columns))).astype(np.float32)


def grid(kind: str, columns: int) -> Grid:
    return grid_for(quant_type_for(kind, columns))


def stored_scales(kind: str, data: np.ndarray) -> np.ndarray:
    """The scales of all blocks [rows, blocks] as bits."""
    blocks = data.reshape(len(data), -1, row_scale.ROW_SCALES[kind].type_size)
    return np.ascontiguousarray(blocks[:, :, :2]).view("<u2")[..., 0]


def test_golden_bytes() -> None:
    codes = np.resize(np.arange(16, dtype=np.uint8), (1, 64))
    scale = np.array([[0.5]], np.float32)
    four = "0038" + "".join(f"{v:x}{v:x}" for v in range(16))
    assert row_scale.pack("W4A8", codes, scale).tobytes().hex() == 2 * four
    eight = "0038" + "".join(f"{v ^ 128:02x}" for v in range(16)) * 2
    assert row_scale.pack("W8A8", codes, scale).tobytes().hex() == 2 * eight


@KINDS
@pytest.mark.usefixtures("built_llama")
def test_ggml_reads_the_same_weights(kind: str) -> None:
    data = quant_type(kind).quantize(weights(7, 576))
    back = quant_type(kind).dequantize(data)
    assert np.array_equal(types.dequantize(row_scale.stored_as(kind), data, 576), back)
    codes, scale = row_scale.unpack(kind, data)
    assert np.array_equal(row_scale.pack(kind, codes, scale), data)


@KINDS
def test_nearest_is_half_a_step_off_at_most(kind: str) -> None:
    """And the scale's own rounding to fp16, 2^-11 of the largest weight."""
    given = weights(9, 320)
    largest = np.abs(given).max(1, keepdims=True)
    error = np.abs(quant_type(kind).dequantize(quant_type(kind).quantize(given)) - given)
    assert np.all(error <= largest * (0.5 / row_scale.ROW_SCALES[kind].largest + 2.0**-10))


@KINDS
def test_zeros_and_huge_rows(kind: str) -> None:
    given = np.zeros((2, 64), np.float32)
    given[1] = 3e38
    back = quant_type(kind).dequantize(quant_type(kind).quantize(given))
    assert not back[0].any()
    assert np.isfinite(back).all()


@KINDS
@pytest.mark.parametrize("columns", [96, 576])
def test_gptq_keeps_one_scale_a_row(kind: str, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    hessian, weight = x.t() @ x, torch.from_numpy(weights(24, columns))
    rounded = round_gptq(weight, inverse_factor(hessian, 0.01), grid(kind, columns))
    assert rounded.data.shape == (24, quant_type(kind).row_bytes(columns))
    scales = stored_scales(kind, rounded.data)
    assert np.array_equal(scales, np.repeat(scales[:, :1], columns // 32, axis=1))
    assert np.array_equal(quant_type(kind).dequantize(rounded.data), rounded.weight.numpy())
    nearest = torch.from_numpy(quant_type(kind).dequantize(quant_type(kind).quantize(weight.numpy())))
    assert objective(weight, rounded.weight, hessian) < 0.7 * objective(weight, nearest, hessian)


def test_updates_of_whole_rows_may_wait() -> None:
    """Columns are taken 128 at a time; one at a time gives the same codes, up to the order of float32 sums."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 288, generator=draw)
    weight, factor, whole = torch.from_numpy(weights(16, 288)), inverse_factor(x.t() @ x, 0.01), grid("W4A8", 288)
    found = code_gptq(weight, factor, whole)
    work, codes = weight.clone(), torch.empty_like(weight)
    for column in range(288):
        codes[:, column] = whole.codes(work[:, column], found.scale[:, 0], found.offset[:, 0])
        error = (work[:, column] - codes[:, column] * found.scale[:, 0]) / factor[column, column]
        work[:, column:] -= error[:, None] * factor[column, column:]
    assert (codes != found.codes).float().mean() < 0.001


def test_outliers_of_a_row_may_be_cut() -> None:
    """One weight of 3000 is 12 times the others' spread: the best scale cuts it off."""
    row = torch.randn(1, 3072, generator=torch.Generator().manual_seed(0))
    row[0, 5] = 12.0
    whole = grid("W4A8", 3072)
    scale, _ = search_range(whole, row, torch.ones(3072))
    dense = min(
        float((whole.codes(row, s, torch.zeros(1, 1)) * s - row).square().sum()) for s in torch.linspace(0.1, 2, 400).view(-1, 1, 1)
    )
    assert float((whole.codes(row, scale, torch.zeros(1, 1)) * scale - row).square().sum()) < 1.02 * dense


def test_rows_that_fill_no_block_fall_to_f16() -> None:
    assert quant_type_for("W4A8", 48).name == "F16"
    assert quant_type_for("w4a8", 96).block_size == 96
