"""Cholesky factors in blocks, and columns of their inverses, are those of LAPACK; a matrix without one is reported."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.rounding import cholesky as module
from mbq_gguf.rounding.cholesky import cholesky

FLOAT64 = 1e-12  # of the largest entry: sums of 70 products in another order, of a matrix whose condition is below 1e3


def positive(size: int) -> torch.Tensor:
    x = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ x.t()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < FLOAT64


@pytest.mark.parametrize(("size", "width"), [(70, 8), (64, 16), (65, 16), (6, 1), (40, 10), (40, 100)])
def test_as_lapack(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.WIDTH, "cpu", width)
    expected = torch.linalg.cholesky(positive(size))
    found = cholesky(positive(size))
    assert int(found.info) == 0
    assert bool(found.inverses) == (size > module.LEAST * width)
    assert same(found.lower.tril(), expected)
    inverse = torch.linalg.inv(expected)
    for first in range(0, size, 2 * width):
        columns = inverse[first:, first : first + 2 * width]
        assert same(found.inverse(first, columns.shape[1]), columns)


@pytest.mark.parametrize("place", [0, 30, 69])
def test_no_factor(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.WIDTH, "cpu", 8)
    matrix = positive(70)
    matrix[place, place] = -1.0
    assert int(cholesky(matrix.clone()).info) != 0
    matrix[place, place] = torch.nan
    assert int(cholesky(matrix).info) != 0
