"""Gaps between tokens: the middle client of a round counts, and modes are compared within rounds."""

from __future__ import annotations

import bench_gaps
from bench_gaps import Round


def test_modes_are_compared_within_rounds_and_the_first_one_warms_up() -> None:
    order: list[str] = []
    gaps = {"off": iter([9.0, 0.1, 0.2, 0.4]), "on": iter([9.0, 0.2, 0.1, 0.4])}

    def run(mode: str) -> Round:
        order.append(mode)
        return Round(((0.001, 0.001), (next(gaps[mode]), 0.1), (99.0, 99.0)), asked=7)

    words = bench_gaps.summary(bench_gaps.interleaved(3, run)).splitlines()
    assert order == ["on", "off", *("off", "on"), *("on", "off"), *("off", "on")]
    assert words == [
        "clock, off: longest gap 200 ms (100 to 400)",
        "clock, on: longest gap 200 ms (100 to 400)",
        "clock, on / off: 1.00 (median of 3 rounds, 0.50 to 2.00)",
        "processor, off: longest gap 100 ms (100 to 100)",
        "processor, on: longest gap 100 ms (100 to 100)",
        "processor, on / off: 1.00 (median of 3 rounds, 1.00 to 1.00)",
        "questions answered in a round: off 7, on 7",
    ]
