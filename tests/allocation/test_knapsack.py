"""The knapsack solver against exhaustive search."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.allocation import knapsack
from mbq_gguf.allocation.knapsack import Option, choose, undominated

LOSSES = st.floats(0, 100, allow_nan=False)
ITEMS = st.lists(st.lists(st.builds(Option, st.integers(0, 40), LOSSES), min_size=1, max_size=4), min_size=1, max_size=5)


def totals(items: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [options[k] for options, k in zip(items, chosen, strict=True)]
    return sum(option.size for option in taken), sum(option.loss for option in taken)


@given(ITEMS, st.integers(0, 150), st.integers(1, 7))
def test_equals_trying_everything(items: list[list[Option]], limit: int, unit: int) -> None:
    items = [[Option(option.size * unit + 3, option.loss) for option in options] for options in items]  # a common divisor, and an offset
    limit *= unit
    fitting = [totals(items, chosen) for chosen in product(*(range(len(options)) for options in items))]
    fitting = [found for found in fitting if found[0] <= limit]
    chosen = choose(items, limit)
    if not fitting:
        assert chosen is None
    else:
        assert chosen is not None
        size, loss = totals(items, chosen)
        assert size <= limit
        assert loss == pytest.approx(min(found[1] for found in fitting), abs=1e-9)


@given(ITEMS, st.integers(40, 150))
def test_coarse_units_keep_the_limit(items: list[list[Option]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "MOST_STATES", 8)
        chosen = choose(items, limit)
    if chosen is not None:
        assert totals(items, chosen)[0] <= limit


def test_by_hand() -> None:
    # Two tensors of 3, 4 or 6 units: with 9 in all, the sensitive one gets 6 and the other 3, although 4 + 4 uses less room.
    items = [[Option(3, 8.0), Option(4, 4.0), Option(6, 1.0)], [Option(3, 1.5), Option(4, 0.7), Option(6, 0.1)]]
    assert choose(items, 9) == [2, 0]
    assert choose(items, 8) == [1, 1]
    assert choose(items, 100) == [2, 2]
    assert choose(items, 5) is None


def test_dominated_options_are_left_out() -> None:
    options = [Option(4, 2.0), Option(3, 5.0), Option(4, 1.0), Option(5, 1.0), Option(6, 0.5)]
    assert undominated(options) == [1, 2, 4]
