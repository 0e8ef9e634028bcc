"""Gaps between tokens: the median client of a round counts, and modes are compared within rounds."""

from __future__ import annotations

import os
import threading
import time

import bench_gaps
import pytest
from bench_gaps import Round


def test_modes_are_compared_within_rounds_and_the_first_one_warms_up() -> None:
    order: list[str] = []
    gaps = {"off": iter([9.0, 0.1, 0.2, 0.4]), "on": iter([9.0, 0.2, 0.1, 0.4])}

    def run(mode: str) -> Round:
        order.append(mode)
        gap = next(gaps[mode])
        return Round(((0.001, 0.001, 0.001), (gap, 0.1, gap / 2), (99.0, 99.0, 99.0)), asked=7)

    words = bench_gaps.summary(bench_gaps.interleaved(3, run)).splitlines()
    assert order == ["on", "off", *("off", "on"), *("on", "off"), *("off", "on")]
    assert words == [
        "longest gap, clock, off: 200 ms (100 to 400)",
        "longest gap, clock, on: 200 ms (100 to 400)",
        "longest gap, clock, on / off: 1.00 (median of 3 rounds, 95 % 0.50 to 2.00, all 0.50 to 2.00)",
        "longest gap, processor, off: 100 ms (100 to 100)",
        "longest gap, processor, on: 100 ms (100 to 100)",
        "longest gap, processor, on / off: 1.00 (median of 3 rounds, 95 % 1.00 to 1.00, all 1.00 to 1.00)",
        "99th percentile, clock, off: 100 ms (50 to 200)",
        "99th percentile, clock, on: 100 ms (50 to 200)",
        "99th percentile, clock, on / off: 1.00 (median of 3 rounds, 95 % 0.50 to 2.00, all 0.50 to 2.00)",
        "questions answered in a round: off 7, on 7",
    ]


def test_the_interval_of_a_median_leaves_out_what_chance_may() -> None:
    """Of 9 values one on each side: 2 (1 + 9) / 512 is 0.039; of 20 five: 0.041."""
    assert bench_gaps.interval([float(value) for value in range(9)]) == (1.0, 7.0)
    assert bench_gaps.interval([float(value) for value in range(20)]) == (5.0, 14.0)
    assert bench_gaps.interval([3.0, 1.0]) == (1.0, 3.0)


def test_threads_that_ended_are_counted() -> None:
    def work() -> None:
        while time.thread_time() < 0.1:
            pass

    before = bench_gaps.processor_seconds(os.getpid())
    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert bench_gaps.processor_seconds(os.getpid()) - before >= 0.1
    assert bench_gaps.processor_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.05)
