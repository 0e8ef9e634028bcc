"""The order of rows, found by sending row numbers through a conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.errors import UserError
from mbq_gguf.export.row_order import row_order

ROWS, COLUMNS, BLOCK = 24, 8, 2


@given(order=st.permutations(range(ROWS)), cut=st.integers(1, ROWS - 1))
def test_permutation_and_split_are_found(order: list[int], cut: int) -> None:
    def transform(data: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        moved = data[torch.tensor(order)]
        return [("first", moved[:cut]), ("second", moved[cut:])]

    found = row_order(transform, (ROWS, COLUMNS), "weight", BLOCK)
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    for name, tensor in transform(torch.from_numpy(weights)):
        assert np.array_equal(found[name].of(weights), tensor.numpy())


@given(order=st.permutations(range(COLUMNS // BLOCK)), rows=st.permutations(range(ROWS)))
def test_blocks_of_columns_follow(order: list[int], rows: list[int]) -> None:
    def transform(data: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [("out", data[torch.tensor(rows)].unflatten(1, (-1, BLOCK))[:, torch.tensor(order)].flatten(1))]

    found = row_order(transform, (ROWS, COLUMNS), "weight", BLOCK)
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    assert np.array_equal(found["out"].of(weights), transform(torch.from_numpy(weights))[0][1].numpy())


def test_untouched_tensor_keeps_its_order() -> None:
    found = row_order(lambda data: [("same", data)], (ROWS, COLUMNS), "weight", BLOCK)
    assert found["same"].rows.tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    "transform",
    [
        lambda data: data.flip(1),
        lambda data: data.roll(1, 1),
        lambda data: data[:, :2].repeat(1, 4),
        lambda data: data.T.reshape(ROWS, COLUMNS),
        lambda data: data.reshape(2 * ROWS, COLUMNS // 2),
        lambda data: data + 0.5,
        lambda data: data - 1,
        lambda data: data.unsqueeze(0),
    ],
    ids=["columns flipped", "blocks cut", "a block repeated", "transposed", "rows cut", "half added", "one taken", "one more dimension"],
)
def test_anything_but_whole_rows_is_refused(transform: object) -> None:
    with pytest.raises(UserError, match="reshapes weight"):
        row_order(lambda data: [("out", transform(data))], (ROWS, COLUMNS), "weight", BLOCK)
