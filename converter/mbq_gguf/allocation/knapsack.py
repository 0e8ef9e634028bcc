"""The multiple-choice knapsack: choose one option for each item, with the least total loss within a size limit.

Dynamic programming over sizes (Dudzinski and Walukiewicz 1987), exact, in units of the greatest common divisor of all differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

# Distinct sizes. Beyond it sizes are rounded up to a coarser unit: the limit still holds, and at most one unit per item stays unused.
MOST_STATES = 1 << 20


@dataclass(frozen=True)
class Option:
    """The size (an integer, such as bytes) and the loss of a choice."""

    size: int
    loss: float


def choose(items: Sequence[Sequence[Option]], limit: int) -> list[int] | None:
    """The option to choose for each item: the least sum of losses with a sum of sizes of at most ``limit``; None if nothing fits."""
    fronts = [undominated(options) for options in items]
    least = [options[front[0]].size for options, front in zip(items, fronts, strict=True)]
    room = limit - sum(least)
    if room < 0:
        return None
    extras = [[options[k].size - base for k in front] for options, front, base in zip(items, fronts, least, strict=True)]
    room = min(room, sum(extra[-1] for extra in extras))
    unit = max(gcd(*(size for extra in extras for size in extra)), -(-room // MOST_STATES), 1)
    states = room // unit + 1
    best, taken = np.zeros(states), []  # best[room]: least loss of the items so far
    for options, front, extra in zip(items, fronts, extras, strict=True):
        now, pick = np.full(states, np.inf), np.zeros(states, np.uint8)
        for place, (k, size) in enumerate(zip(front, extra, strict=True)):
            step = -(-size // unit)
            if step >= states:
                break
            loss = best[: states - step] + options[k].loss
            better = loss < now[step:]
            now[step:][better], pick[step:][better] = loss[better], place
        best = now
        taken.append(pick)
    state, chosen = states - 1, []
    for pick, front, extra in zip(reversed(taken), reversed(fronts), reversed(extras), strict=True):
        chosen.append(front[pick[state]])
        state -= -(-extra[pick[state]] // unit)
    return chosen[::-1]


def undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the Pareto-optimal options, by increasing size; the first of equal ones."""
    out: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (options[k].size, options[k].loss)):
        if not out or options[k].loss < options[out[-1]].loss:
            out.append(k)
    return out
