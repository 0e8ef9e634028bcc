"""Static ranges of a tower's activations: chosen by an estimator, and none if outliers would cost other rows too much precision."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration.tower_ranges import COARSER, SiteInputs, counting, tower_range_keys
from mbq_gguf.transforms.activations import int8_tokens
from torch import nn


def rows(count: int = 400, width: int = 256) -> torch.Tensor:
    """As a norm gives them."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def given(x: torch.Tensor) -> SiteInputs:
    found = SiteInputs()
    for part in x.split(100):
        found.add(part)
    return found


def test_the_errors_are_those_of_rounding() -> None:
    """Both sums against real codes: exact for rows' own ranges, and to 3 %, a bin's width, for one range of all."""
    x, limit = rows(), 4.0
    found = given(x)
    own, all_alike = ((int8_tokens(x, ranges) - x).double().square().sum() for ranges in (None, torch.full((len(x),), limit)))
    assert found.dynamic == pytest.approx(float(own), rel=1e-6)
    assert found.worse(limit) == pytest.approx(float(all_alike / own), rel=0.03)


def test_ordinary_rows_have_a_range() -> None:
    found = given(rows())
    assert found.range("minmax") == float(rows().abs().max())
    assert 3.5 < found.range("p99.99") < found.range("minmax")


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_a_row_of_outliers_leaves_the_site_dynamic(size: float) -> None:
    """Kept whole it would cost the others two bits and more, though the sum of errors may be its own; cut it would be lost itself."""
    x = rows()
    x[7] *= size
    found = given(x)
    assert found.coarser(found.magnitudes.range("minmax")) > COARSER
    assert found.worse(found.magnitudes.range("p99.9")) > COARSER**2
    assert found.range("minmax") == found.range("p99.9") == 0.0


def test_rows_of_a_few_sizes_have_a_range() -> None:
    """Also where most are small: their errors are no larger than those of the rows beside them."""
    x = rows() * torch.linspace(1, 3, 400)[:, None]
    x[: len(x) * 4 // 5] /= 100
    found = given(x)
    assert found.range("minmax") == found.magnitudes.largest
    assert 1.0 < found.coarser(found.magnitudes.largest) < COARSER


def test_nothing_zeros_and_what_counts_as_zeros_are_dynamic() -> None:
    assert (
        SiteInputs().range("p99.99") == given(torch.zeros(4, 8)).range("p99.99") == given(torch.full((4, 8), 1e-30)).range("minmax") == 0.0
    )


def test_what_modules_are_given_is_counted_and_the_keys_name_it() -> None:
    first, same, other, second = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 4)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        with counting([[first, same, other], [second]]) as found:
            between = first(x)
            same(x)
            other(2 * x)
            second(between)
        first(100 * x)  # no more
    assert [site.magnitudes.largest for site in found] == [2 * float(x.abs().max()), float(between.abs().max())]
    assert [int(site.magnitudes.counts.sum()) for site in found] == [2 * x.numel(), between.numel()]
    keys = tower_range_keys("minmax", [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 0.0]])
    assert keys["mbq.act.range.down.vision"] == [4.0, 0.0]
    assert (keys["mbq.act.version"], keys["mbq.act.estimator"], keys["mbq.act.range.qkv.vision"]) == (1, "minmax", [1.0, 5.0])
