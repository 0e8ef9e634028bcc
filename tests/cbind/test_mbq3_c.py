"""The MBQ types: numpy and C agree byte for byte, and the CPU's dot product follows the documented arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mbq_cbind import types
from mbq_gguf.formats import mbq3, mbq3s
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType

QUANT_TYPES = pytest.mark.parametrize("quant_type", OWN.values(), ids=OWN)
COMPACT = ("MBQ3S", "MBQ3S_64")  # a scale word for each half of a block
LARGEST_WORD = 0x3DF << 6 | 63  # the scale 63488 and the zero point 63/8; above it fp16 has infinity
COLUMNS = 256
F32_MAX = float(np.finfo(np.float32).max)

# Every finite float32, with the magnitudes where fp16 and float32 end drawn as often as ordinary ones.
ANY_FLOAT = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 65520.0, 1e-8, -1e-8, 2.0**-24, 2.0**-149, -(2.0**-149), F32_MAX, -F32_MAX]),
)

EDGE_ROWS = {
    "zeros": np.zeros(COLUMNS),
    "negative zeros": np.full(COLUMNS, -0.0),
    "both zeros": np.tile([0.0, -0.0], COLUMNS // 2),
    "constant": np.full(COLUMNS, 0.7),
    "constant beyond fp16": np.full(COLUMNS, -1e30),
    "huge": np.linspace(-3e38, 3e38, COLUMNS),
    "at the end of fp16": np.linspace(-65504, 65504, COLUMNS),
    "tiny": np.linspace(-1e-7, 1e-7, COLUMNS),
    "denormal": np.linspace(-1e-42, 1e-42, COLUMNS),
    "one outlier": np.r_[np.linspace(-1, 1, COLUMNS - 1), 500.0],
    "halfway between codes": np.r_[np.arange(COLUMNS - 1) % 14 * 0.5, 7.0],
}


def random_rows(rows: int, columns: int, seed: int = 0) -> Floats:
    scale = np.exp(np.random.default_rng(seed).normal(size=(rows, 1)))
    return (np.random.default_rng(seed + 1).normal(size=(rows, columns)) * scale).astype(np.float32)


@QUANT_TYPES
def test_type_traits_match_the_quant_type(quant_type: QuantType) -> None:
    info = types.type_info(quant_type.name)
    assert types.type_id(quant_type.name) == quant_type.type_id
    assert (info.block_size, info.type_size, info.is_quantized) == (quant_type.block_size, quant_type.type_size, True)


@QUANT_TYPES
def test_golden_block(quant_type: QuantType) -> None:
    """Codes at both ends of planes and halves, packed by C into bytes written out by hand (docs/format.md)."""
    size = quant_type.block_size
    last = size // 4 - 1
    codes = np.zeros((4, size // 4), np.float32)  # [plane, byte]
    codes[0, 0], codes[1, last], codes[2, 0], codes[2, size // 8], codes[3, 2], codes[3, last] = 7, 5, 7, 6, 4, 3
    weights = codes.reshape(1, size)
    if quant_type.name in COMPACT:
        weights[:, size // 2 :] = weights[:, size // 2 :] / 2 - 1
        scales = "00 78 10 70"  # d = 1 (fp16 0x3C00, shifted 0x7800), z = 0; d = 0.5 (0x3800, 0x7000), z = 1 / 0.5 * 8 = 0x10
    else:
        scales = "00 3c 00 00"  # d = 1, m = 0
    zeros = " 00" * (size // 8)
    # Low bits of planes 0 and 2: 11 and 11 << 4; of plane 2: 10 << 4; of planes 1 and 3: 01 << 2 and 11 << 6.
    ql = f"33 {zeros[:-3]} 20 {zeros[:-6]} c4"
    # High bits in byte 0: plane 0 half 0 is bit 2, plane 2 bits 6 and 7; then plane 3 half 0, bit 0; plane 1 half 1, bit 5.
    qh = f"c4 00 01 {zeros[:-12]} 20"
    expected = np.frombuffer(bytes.fromhex(scales + ql + qh), np.uint8)
    assert np.array_equal(types.quantize(quant_type.name, weights)[0], expected)
    assert np.array_equal(types.dequantize(quant_type.name, expected[None], size), weights)


@QUANT_TYPES
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_pack_equals_c_on_random_rows(quant_type: QuantType, rows: int) -> None:
    weights = random_rows(rows, 1536)
    assert np.array_equal(quant_type.quantize(weights), types.quantize(quant_type.name, weights))


@QUANT_TYPES
@pytest.mark.parametrize("name", EDGE_ROWS)
def test_pack_equals_c_on_edge_rows(quant_type: QuantType, name: str) -> None:
    weights = EDGE_ROWS[name][None].astype(np.float32)
    packed = types.quantize(quant_type.name, weights)
    assert np.array_equal(quant_type.quantize(weights), packed)
    assert types.is_valid(quant_type.name, packed)


@QUANT_TYPES
@settings(max_examples=200)
@given(weights=arrays(np.float32, (1, 128), elements=ANY_FLOAT))
def test_pack_equals_c_on_any_row(quant_type: QuantType, weights: Floats) -> None:
    assert np.array_equal(quant_type.quantize(weights), types.quantize(quant_type.name, weights))


@QUANT_TYPES
@settings(max_examples=100)
@given(payload=st.binary(min_size=104, max_size=104), scale=ANY_FLOAT, minimum=ANY_FLOAT)
def test_unpack_equals_c_on_any_block(quant_type: QuantType, payload: bytes, scale: float, minimum: float) -> None:
    data = np.frombuffer(payload, np.uint8)[: quant_type.row_bytes(128)].copy().reshape(-1, quant_type.type_size)
    if quant_type.name in COMPACT:
        words = data[:, :4].view("<u2")
        words[:] = np.minimum(words, LARGEST_WORD)
    else:
        data[:, :4] = np.clip([scale, minimum], -65504, 65504).astype("<f2").view(np.uint8)
    rows = data.reshape(1, -1)
    assert np.array_equal(quant_type.dequantize(rows), types.dequantize(quant_type.name, rows, 128))


@QUANT_TYPES
def test_unpack_equals_c_on_random_rows(quant_type: QuantType) -> None:
    packed = quant_type.quantize(random_rows(7, 1536))
    assert np.array_equal(quant_type.dequantize(packed), types.dequantize(quant_type.name, packed, 1536))


@QUANT_TYPES
@pytest.mark.parametrize("columns", [128, 256, 1536, 8960])
def test_vec_dot_is_the_integer_product(quant_type: QuantType, columns: int) -> None:
    """The kernel multiplies exact integers: against float64 on the same Q8_1 activations only its float32 sums may differ.

    Each block's d*d8*isum and m*s are rounded once, and so is every addition of their running sum; 8 lanes at most add in another order.
    """
    assert types.activation_type(quant_type.name) == "q8_1"
    weights, x = random_rows(5, columns), random_rows(1, columns, seed=7)[0]
    packed = quant_type.quantize(weights)
    scale, total, codes = unpack_q8_1(types.round_activations(quant_type.name, x[None]))
    w_codes, d, m = split(quant_type, packed)
    products = d * (w_codes * codes).sum(-1) * scale
    minima = m * total
    exact = (products + minima).sum(axis=-1)
    operations = 2 * (columns // 32) + 16
    float_sums = operations * 2.0**-24 * (np.abs(products) + np.abs(minima)).sum(axis=-1)
    assert np.all(np.abs(types.vec_dot(quant_type.name, packed, columns, x) - exact) <= float_sums)


@pytest.mark.parametrize("importance", [False, True])
@QUANT_TYPES
def test_nan_becomes_code_0_and_validation_says_so(quant_type: QuantType, importance: bool) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    imatrix = np.ones(512, np.float32) if importance else None
    good = types.quantize(quant_type.name, weights, imatrix)
    weights[1, 70] = np.nan
    packed = types.quantize(quant_type.name, weights, imatrix)
    assert types.is_valid(quant_type.name, good)
    assert not types.is_valid(quant_type.name, packed)
    blocks, before = (data.reshape(-1, quant_type.type_size) for data in (packed, good))
    number = (512 + 70) // quant_type.block_size
    assert np.array_equal(np.delete(blocks, number, axis=0), np.delete(before, number, axis=0))
    assert mbq3.unpack_planes(blocks[number : number + 1, 4:])[0, 70 % quant_type.block_size] == 0


def unpack_q8_1(data: Bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q8_1 blocks (fp16 d, fp16 s = d * sum, 32 int8) as float64: d and s [blocks], codes [blocks, 32]."""
    blocks = data.reshape(-1, 36)
    pair = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float64)
    return pair[:, 0], pair[:, 1], blocks[:, 4:].view(np.int8).astype(np.float64)


def split(quant_type: QuantType, packed: Bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed rows as float64 pieces of 32 weights: codes [rows, pieces, 32], scale and minimum [rows, pieces]."""
    unpack = mbq3s.unpack_blocks if quant_type.name in COMPACT else mbq3.unpack_blocks
    codes, d, m = unpack(packed.reshape(-1, quant_type.type_size))
    pieces = quant_type.block_size // 32 // d.shape[1]
    rows = len(packed)
    return (
        codes.astype(np.float64).reshape(rows, -1, 32),
        np.repeat(d.astype(np.float64).reshape(rows, -1), pieces, axis=1),
        np.repeat(m.astype(np.float64).reshape(rows, -1), pieces, axis=1),
    )
