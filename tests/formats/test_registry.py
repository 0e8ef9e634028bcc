"""Names and fallbacks of types, and the stock types' bytes."""

from __future__ import annotations

import numpy as np
import pytest
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.registry import names, quant_type, quant_type_for


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("MBQ3", 1536, "MBQ3"),
        ("MBQ3", 576, "MBQ3_64"),
        ("MBQ3", 96, "Q4_0"),
        ("MBQ3", 80, "F16"),
        ("MBQ3S", 1536, "MBQ3S"),
        ("MBQ3S", 576, "MBQ3S_64"),
        ("MBQ3S", 96, "Q4_0"),
        ("Q3_K", 1536, "Q3_K"),
        ("Q3_K", 576, "Q4_0"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("IQ3_S", 576, "IQ4_NL"),
        ("IQ3_S", 72, "F16"),
        ("BF16", 7, "BF16"),
    ],
)
def test_fallback_until_the_row_fits(name: str, columns: int, expected: str) -> None:
    assert quant_type_for(name, columns).name == expected


def test_every_name_has_a_type_whose_chain_ends() -> None:
    for name in names():
        kind = quant_type(name)
        assert kind.name == name
        assert quant_type_for(name, 8).block_size == 1


def test_names_in_any_case_and_unknown_ones() -> None:
    assert quant_type("mbq3_64") is quant_type("MBQ3_64")
    with pytest.raises(UsageError, match=r"no type Q3_X: choose one of MBQ3, MBQ3_64, MBQ3S, MBQ3S_64, W4A8, W8A8, F32"):
        quant_type("Q3_X")


# Largest error of a weight over the largest weight of its block (or the type's rounding, for the float types).
BOUNDS = {
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127 + 2**-10,
    "Q4_0": 1 / 8 + 2**-10,
    "Q4_1": 1 / 15 + 2**-9,
    "Q5_1": 1 / 31 + 2**-9,
}


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_stock_types_keep_weights_within_their_step(name: str) -> None:
    weights = np.random.default_rng(1).uniform(-1, 1, (8, 64)).astype(np.float32)
    kind = quant_type(name)
    data = kind.quantize(weights)
    assert data.shape == (8, kind.row_bytes(64))
    assert data.dtype == np.uint8
    assert np.abs(kind.dequantize(data) - weights).max() <= BOUNDS[name]
