"""Histograms of magnitudes: quantiles within a bin's width, and the ranges that estimators derive from them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from mbq_gguf.calibration.magnitudes import BINS, CODES, Estimator, Magnitudes
from mbq_gguf.transforms.activations import int8_tokens

WIDTH = 2 ** (1 / 32) * 1.0105  # of a bin at most, as a ratio: 32 an octave, evenly spaced within it


def counted(*parts: torch.Tensor) -> Magnitudes:
    found = Magnitudes()
    for part in parts:
        found.add(part)
    return found


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 0.9999, 1.0])
def test_quantiles_are_within_a_bin(share: float) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 3
    true = float(torch.quantile(x.abs(), share))
    assert true <= counted(x[:100], x[100:]).quantile(share) * (1 + 1e-6)
    assert counted(x).quantile(share) <= true * WIDTH


def test_nothing_and_zeros() -> None:
    assert counted(torch.empty(0, 4)).range("minmax") == counted(torch.empty(0, 4)).range("least-squares") == 0
    assert {counted(torch.zeros(5)).range(kind) for kind in get_args(Estimator)} == {0.0}
    assert int(counted(torch.tensor([0.0, -3.4e38, 1e-45])).counts.sum()) == 3
    assert len(counted(torch.zeros(1)).counts) == BINS


def test_minmax_is_exact() -> None:
    assert counted(torch.tensor([[1.0, -7.123], [2.0, 3.0]])).range("minmax") == float(torch.tensor(7.123))


def test_least_squares_is_the_best_range_of_a_true_search() -> None:
    """Against every range of a fine grid, with real rounding; an error within 2 % of the least, which a bin's width costs at most."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    x[0] = 20.0
    least = min(_error(x, limit) for limit in torch.linspace(0.2, 20, 60).tolist())
    assert _error(x, counted(x).range("least-squares")) <= 1.02 * least
    assert least < 0.7 * _error(x, 20.0)


def _error(x: torch.Tensor, limit: float) -> float:
    return float((int8_tokens(x[None], torch.tensor([limit]))[0] - x).square().mean())


def test_static_rows_are_cut_and_others_are_dynamic() -> None:
    x = torch.tensor([[0.5, -1.0, 4.0], [0.5, -1.0, 4.0]])
    static, dynamic = int8_tokens(x, torch.tensor([1.0, 0.0]))
    assert torch.equal(static, torch.tensor([64 / CODES, -1.0, 1.0]))  # 63.5 to the even code
    assert torch.equal(dynamic, int8_tokens(x)[1])


def test_beyond_counts_what_lies_behind_a_limit() -> None:
    assert counted(torch.arange(1, 101).float()).beyond(64.0) == 37 / 100
