"""Cholesky factors by blocks are those of LAPACK, and what has none is told."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.rounding import cholesky as module
from mbq_gguf.rounding.cholesky import cholesky

FLOAT64 = 1e-12  # of the largest entry: sums of 70 products in another order, of a matrix whose condition is below 1e3


def positive(size: int) -> torch.Tensor:
    x = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ x.t()


@pytest.mark.parametrize(("size", "width"), [(70, 8), (64, 16), (65, 16), (5, 1), (40, 10), (40, 100)])
def test_as_lapack(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.WIDTH, "cpu", width)
    expected = torch.linalg.cholesky(positive(size))
    lower, info = cholesky(positive(size))
    assert int(info) == 0
    assert float((lower.tril() - expected).abs().max() / expected.abs().max()) < FLOAT64


@pytest.mark.parametrize("place", [0, 30, 69])
def test_no_factor(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.WIDTH, "cpu", 8)
    matrix = positive(70)
    matrix[place, place] = -1.0
    assert int(cholesky(matrix.clone())[1]) != 0
    matrix[place, place] = torch.nan
    assert int(cholesky(matrix)[1]) != 0
