"""Keeps code that lies in a model directory from running: a model is data here."""

from __future__ import annotations

from typing import Any

from mbq_gguf.errors import UserError


def forbid_remote_code() -> None:
    """From now on no call of this process, llama.cpp's conversion package included, runs code of a model directory.

    Where a file of settings names a class in the directory (``auto_map``), transformers asks on the terminal whether to run it, and a
    "y" from a pipe did; the conversion package says yes for some families. Without a time to answer in, transformers raises ValueError
    instead of asking, and the one function that imports such code refuses.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    dynamic_module_utils.get_class_in_module = _refuse


def _refuse(class_name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"the model needs code of its directory ({class_name}), which is never run: use a model that transformers knows")
