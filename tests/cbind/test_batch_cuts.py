"""Products have the same bits for any split of the columns, any batch, and any number of threads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbq_cbind import types
from mbq_cbind.mul_mat import mul_mat, mul_mat_id
from mbq_cbind.types import Bytes, Floats

BLOCKS = {"MBQ3": 128, "MBQ3_64": 64, "MBQ3S": 128, "MBQ3S_64": 64}
ROW_SCALE = {"Q4_0": 32, "Q8_0": 32}  # one scale per row, which is what the flag promises
KINDS = BLOCKS | ROW_SCALE
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
CUDA_COLUMNS = 8  # of one kernel


def weights(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> Bytes:
    columns = shape[-1]
    packed = types.quantize(kind, random.normal(size=(int(np.prod(shape[:-1])), columns)).astype(np.float32))
    if kind in ROW_SCALE:
        blocks = packed.reshape(len(packed), columns // 32, -1)
        blocks[..., :2] = blocks[:, :1, :2]
    return packed.reshape(*shape[:-1], -1)


def pieces(data: st.DataObject, n: int, longest: int) -> list[slice]:
    """n columns cut into pieces of up to ``longest``."""
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(min(n, cuts[-1] + data.draw(st.integers(1, longest), "columns of a piece")))
    return [slice(a, b) for a, b in pairwise(cuts)]


def activations(data: st.DataObject, random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Rows of very different size, as visual tokens and text have."""
    sizes = 2.0 ** random.integers(-data.draw(st.sampled_from([0, 12]), "sizes") - 1, 1, (*shape[:-1], 1))
    return (random.normal(size=shape) * sizes).astype(np.float32)


@EVERY_KIND
@settings(max_examples=40)
@given(data=st.data())
def test_columns_cut_anyhow_give_the_same_bits(kind: str, data: st.DataObject) -> None:
    columns = KINDS[kind] * data.draw(st.integers(1, 12) | st.just(70), "blocks")
    rows, n = data.draw(st.integers(1, 70), "rows"), data.draw(st.integers(2, 40), "columns")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    packed, x = weights(kind, (rows, columns), random), activations(data, random, (n, columns))

    def product(part: Floats) -> Floats:
        threads, spacing = data.draw(st.integers(1, 3), "threads"), data.draw(st.integers(0, 3), "spacing")
        return mul_mat(kind, packed, columns, part, threads=threads, spacing=spacing, row_scale=kind in ROW_SCALE)

    whole = product(x)
    cut = np.concatenate([product(x[piece]) for piece in pieces(data, n, longest=data.draw(st.sampled_from([1, 3, 14]), "longest"))])
    assert np.array_equal(whole, cut)


@EVERY_KIND
def test_columns_as_a_dimension_of_their_own_give_the_same_bits(kind: str) -> None:
    random = np.random.default_rng(0)
    columns, rows = KINDS[kind] * 5, 21
    packed, x = weights(kind, (rows, columns), random), random.normal(size=(12, columns)).astype(np.float32)
    flag = kind in ROW_SCALE
    whole = mul_mat(kind, packed, columns, x, row_scale=flag)
    for shape in ((12, 1), (4, 3), (2, 3, 2)):
        outer = mul_mat(kind, packed.reshape(*(1,) * (len(shape) - 1), rows, -1), columns, x.reshape(*shape, columns), row_scale=flag)
        assert np.array_equal(outer.reshape(12, rows), whole)


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=25)
@given(data=st.data())
def test_tokens_cut_anyhow_get_the_same_from_their_experts(kind: str, data: st.DataObject) -> None:
    columns = BLOCKS[kind] * data.draw(st.integers(1, 6), "blocks")
    rows, n, used = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(2, 20), "tokens"), data.draw(st.integers(1, 3), "used")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    packed = weights(kind, (4, rows, columns), random)
    x = activations(data, random, (n, data.draw(st.sampled_from([1, used]), "activations a token"), columns))
    experts = np.stack([random.permutation(4)[:used] for _ in range(n)]).astype(np.int32)

    def product(piece: slice) -> Floats:
        threads = data.draw(st.integers(1, 3), "threads")
        return mul_mat_id(kind, packed, columns, x[piece], experts[piece], threads=threads)

    cut = np.concatenate([product(piece) for piece in pieces(data, n, longest=5)])
    assert np.array_equal(product(slice(0, n)), cut)


def test_experts_give_the_product_of_their_weights() -> None:
    random = np.random.default_rng(0)
    packed, x = weights("MBQ3S", (4, 9, 256), random), random.normal(size=(6, 1, 256)).astype(np.float32)
    experts = random.integers(0, 4, (6, 2)).astype(np.int32)
    stored = types.dequantize("MBQ3S", packed.reshape(36, -1), 256).reshape(4, 9, 256).astype(np.float64)
    exact = np.einsum("nk,nerk->ner", x[:, 0], stored[experts])
    size = np.einsum("nk,nerk->ner", np.abs(x[:, 0]), np.abs(stored[experts]))
    assert np.all(
        np.abs(mul_mat_id("MBQ3S", packed, 256, x, experts) - exact) <= 0.02 * size
    )  # int8 activations: half a step in 127, and spare


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [256, 576, 1536, 8960])
@EVERY_KIND
def test_two_to_eight_columns_on_cuda_do_not_know_of_each_other(kind: str, columns: int) -> None:
    """One column alone is summed in another order there (docs/format.md), unless its weights have one scale per row."""
    if columns % KINDS[kind]:
        pytest.skip(f"{kind} keeps {KINDS[kind]} weights per block")
    random = np.random.default_rng(columns)
    packed, x = weights(kind, (77, columns), random), random.normal(size=(CUDA_COLUMNS, columns)).astype(np.float32)
    fewest = 1 if kind in ROW_SCALE else 2
    flag = kind in ROW_SCALE
    whole = mul_mat(kind, packed, columns, x, device="CUDA0", row_scale=flag)
    for n in range(fewest, CUDA_COLUMNS):
        for first in range(CUDA_COLUMNS - n + 1):
            part = mul_mat(kind, packed, columns, x[first : first + n], device="CUDA0", row_scale=flag)
            assert np.array_equal(part, whole[first : first + n]), f"columns {first} to {first + n - 1}"
