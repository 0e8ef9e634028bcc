"""Keeps code that lies in a model directory from running, unless ``--trust-remote-code`` was given: a model is data here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.settings import TRUST

_allowed = False
_originals: dict[str, Any] = {}


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Let code of a model directory run during the block where ``allowed``, and only then."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def runs_remote_code() -> bool:
    """Whether code of a model directory may run: what ``trust_remote_code`` is to be, asked before each directory is opened.

    Where it may not, no call of this process runs any, llama.cpp's conversion package included, which trusts some families: where a file
    of settings names a class in the directory (``auto_map``), transformers asks on the terminal whether to run it, and a "y" from a pipe
    did. Without a time to answer in, transformers raises ValueError instead of asking, and the one function that imports such code refuses.
    """
    from transformers import dynamic_module_utils as modules

    if not _originals:
        _originals.update(TIME_OUT_REMOTE_CODE=modules.TIME_OUT_REMOTE_CODE, get_class_in_module=modules.get_class_in_module)
    closed = {"TIME_OUT_REMOTE_CODE": 0, "get_class_in_module": _refuse}
    for name, value in (_originals if _allowed else closed).items():
        setattr(modules, name, value)
    return _allowed


def _refuse(class_name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"the model needs code of its directory ({class_name}): give {TRUST} if you trust whoever wrote it, or another model")
