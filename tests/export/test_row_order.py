"""The order of rows found by sending row numbers through a conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.errors import UserError
from mbq_gguf.export.row_order import row_order

ROWS, COLUMNS = 24, 8


@given(order=st.permutations(range(ROWS)), cut=st.integers(1, ROWS - 1))
def test_permutation_and_split_are_found(order: list[int], cut: int) -> None:
    def transform(data: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        moved = data[torch.tensor(order)]
        return [("first", moved[:cut]), ("second", moved[cut:])]

    found = row_order(transform, (ROWS, COLUMNS), "weight")
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    for name, tensor in transform(torch.from_numpy(weights)):
        assert np.array_equal(weights[found[name]], tensor.numpy())


def test_untouched_tensor_keeps_its_order() -> None:
    found = row_order(lambda data: [("same", data)], (ROWS, COLUMNS), "weight")
    assert found["same"].tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    "transform",
    [
        lambda data: data.flip(1),
        lambda data: data.T.reshape(ROWS, COLUMNS),
        lambda data: data.reshape(2 * ROWS, COLUMNS // 2),
        lambda data: data + 0.5,
        lambda data: data - 1,
        lambda data: data.unsqueeze(0),
    ],
    ids=["columns flipped", "transposed", "rows cut", "half added", "one taken", "one more dimension"],
)
def test_anything_but_whole_rows_is_refused(transform: object) -> None:
    with pytest.raises(UserError, match="reshapes weight"):
        row_order(lambda data: [("out", transform(data))], (ROWS, COLUMNS), "weight")
