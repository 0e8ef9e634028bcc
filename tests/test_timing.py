"""Nested stages: each second counts once."""

from __future__ import annotations

import time

import pytest
from mbq_gguf.timing import Timer

LATE = 0.05  # seconds that a sleep may take longer on a busy machine


def test_a_stage_within_another_stops_its_clock() -> None:
    timer, start = Timer(), time.perf_counter()
    with timer.timed("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with timer.timed("inner"):
                time.sleep(0.03)
    wall = time.perf_counter() - start
    assert wall - LATE < sum(timer.seconds.values()) <= wall
    assert timer.seconds["inner"] >= 0.06
    assert 0.02 <= timer.seconds["outer"] < wall - 0.06


def test_time_between_stages_is_nobodys() -> None:
    timer = Timer()
    with timer.timed("a"):
        pass
    time.sleep(0.05)
    with timer.timed("a"):
        pass
    assert timer.seconds["a"] < 0.05


def test_a_stage_that_fails_ends() -> None:
    timer = Timer()
    with pytest.raises(KeyError), timer.timed("outer"), timer.timed("inner"):
        raise KeyError
    with timer.timed("next"):
        time.sleep(0.02)
    assert timer.seconds["inner"] < 0.02 <= timer.seconds["next"]
