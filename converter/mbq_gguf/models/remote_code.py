"""Prevents Python code in a model directory from running unless ``--trust-remote-code`` is given."""

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
    """Allow code in model directories to run within the block, if ``allowed``."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def runs_remote_code() -> bool:
    """Whether code in a model directory may run: the value for ``trust_remote_code``, to be queried before each directory is opened.

    If not, this also blocks such code for the whole process, including llama.cpp's conversion package, which trusts some families. When a
    configuration names a class in the directory (``auto_map``), transformers would ask on the terminal whether to run it and accept a "y"
    from a pipe. With a timeout of 0 it raises ValueError instead of asking, and the one function that imports such code is replaced by
    one that refuses.
    """
    from transformers import dynamic_module_utils as modules

    if not _originals:
        _originals.update(TIME_OUT_REMOTE_CODE=modules.TIME_OUT_REMOTE_CODE, get_class_in_module=modules.get_class_in_module)
    blocked = {"TIME_OUT_REMOTE_CODE": 0, "get_class_in_module": _refuse}
    for name, value in (_originals if _allowed else blocked).items():
        setattr(modules, name, value)
    return _allowed


def _refuse(class_name: str, *_: Any, **__: Any) -> None:
    raise UserError(
        f"the model needs Python code from its directory ({class_name}): give {TRUST} if you trust its authors, or use another model"
    )
