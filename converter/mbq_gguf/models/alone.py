"""Whether a model's language model is converted alone: its tower may then be one that llama.cpp knows nothing of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALONE = ContextVar("alone", default=False)


def alone() -> bool:
    """Whether it is, in the block of :func:`language_model_alone` that we are in."""
    return _ALONE.get()


@contextmanager
def language_model_alone(wanted: bool) -> Iterator[None]:
    """Within the block models are checked and loaded for that, where ``wanted``."""
    token = _ALONE.set(wanted)
    try:
        yield
    finally:
        _ALONE.reset(token)
