"""JSON with faults: values of another type, keys missing, misspelt or twice, nesting, numbers without end, text that is none."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from mutators import raw

ODD: tuple[Any, ...] = (
    None, True, 0, 1 << 64, 1e308, 0.5, "", "x", "<image>", "data:image/png;base64,AAAA", "data:,%", "\x00", "a" * 3000, "../" * 20,
    "http://127.0.0.1/x.png", "file:///etc/passwd", "\ud800", [], {}, [None], [[]], {"a": []}, ["x"], [1, "x"], "NaN", "\u2028",
    "/dev/null",
)  # fmt: skip
LITERALS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b"[" * 2000 + b"]" * 2000,
    b'{"a":' * 2000,
    b"00",
    b"tru",
)


def mutate(value: Any, draw: random.Random) -> tuple[bytes, str]:
    """The JSON of ``value`` spoilt, and what was done to it. ``value`` itself stays as it is."""
    value, done = json.loads(json.dumps(value)), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        edit = draw.choice((change, remove, misspell, wrap, add))
        value = edit(value, draw)
        done.append(edit.__name__)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.7).encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        text, words = _literal(text, draw)
        done.append(words)
    if draw.random() < 0.1:
        text, words = raw.mutate(text, draw)
        done.append(words)
    return text, " ".join(done)


def odd(draw: random.Random) -> Any:
    """One of :data:`ODD`, of its own."""
    return copy.deepcopy(draw.choice(ODD))


def change(value: Any, draw: random.Random) -> Any:
    """Something has another value."""
    holder, key = _somewhere(value, draw)
    if holder is None:
        return odd(draw)
    holder[key] = odd(draw)
    return value


def remove(value: Any, draw: random.Random) -> Any:
    """Something is missing."""
    holder, key = _somewhere(value, draw)
    if holder is not None:
        del holder[key]
    return value


def misspell(value: Any, draw: random.Random) -> Any:
    """A key has another name."""
    holder, key = _somewhere(value, draw)
    if isinstance(holder, dict):
        holder[draw.choice((key + "s", key[1:], key.upper(), "", "role", "image", "type"))] = holder.pop(key)
    return value


def wrap(value: Any, draw: random.Random) -> Any:
    """Something lies in a list, or in an object."""
    holder, key = _somewhere(value, draw)
    if holder is None:
        return [value]
    holder[key] = draw.choice(([holder[key]], {"a": holder[key]}, [holder[key], copy.deepcopy(holder[key])]))
    return value


def add(value: Any, draw: random.Random) -> Any:
    """Something more."""
    holder, _ = _somewhere(value, draw)
    if isinstance(holder, dict):
        holder[draw.choice(("x", "image", "images", "task", "conversations", "messages", "turns", "text"))] = odd(draw)
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(draw.choice((*ODD, *holder))))
    return value


def _literal(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    """What Python's json would not write, in the place of a value."""
    places = [index for index, byte in enumerate(text) if byte == ord(":")]
    place = draw.choice(places) + 1 if places else 0
    ends = [end for end in (text.find(mark, place) for mark in (b",", b"}", b"]")) if end >= 0]
    return text[:place] + draw.choice(LITERALS) + text[min(ends, default=len(text)) :], "literal"


def _somewhere(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """An object or list anywhere in ``value`` and a key of it; None if there is none."""
    holders: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        found = waiting.pop()
        items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, inner in items:
            holders.append((found, key))
            waiting.append(inner)
    return draw.choice(holders) if holders else (None, None)
