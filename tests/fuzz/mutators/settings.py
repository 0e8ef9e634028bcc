"""Settings of a model with faults: one to three of another kind, of no size that a model has, or missing."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    10**9,
    1 << 40,
    1 << 70,
    "",
    "x",
    "64",
    [],
    [1],
    [1, 2, 3],
    ["x"],
    {},
    {"a": 1},
)
MISSING = object()


def mutate(settings: dict[str, Any], draw: random.Random) -> tuple[bytes, str]:
    """The JSON of ``settings`` spoilt, and what was done to it."""
    spoilt, done = copy.deepcopy(settings), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder, key, path = draw.choice(list(places(spoilt)))
        value = draw.choice((*ODD, MISSING))
        if value is MISSING:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(value)
        done.append(f"{path}: {'missing' if value is MISSING else repr(value)}")
        if not spoilt:
            break
    return json.dumps(spoilt).encode(), ", ".join(done)


def places(value: Any, path: str = "") -> Any:
    """Every object or list in ``value`` with each of its keys, and what it is called."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key, f"{path}/{key}"
        yield from places(inner, f"{path}/{key}")
