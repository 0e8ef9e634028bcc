"""Whether only the language model is converted (``--language-model-only``), for models whose vision tower llama.cpp does not support."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALONE = ContextVar("alone", default=False)


def language_only() -> bool:
    """Whether this runs within an active :func:`language_only_mode`."""
    return _ALONE.get()


@contextmanager
def language_only_mode(wanted: bool) -> Iterator[None]:
    """Check and load models as language models only within the block, if ``wanted``."""
    token = _ALONE.set(wanted)
    try:
        yield
    finally:
        _ALONE.reset(token)
