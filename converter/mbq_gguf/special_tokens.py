"""Rejects questions and answers that contain one of the model's special tokens.

llama-server and transformers tokenise a whole conversation at once, including the user's words: ``<|im_end|>`` in a question would end the
turn, and ``<|image_pad|>`` would stand for part of a picture that does not exist. Neither can treat it as text, so ``convert``, ``eval``
and ``ask`` refuse it. libmtmd's marker for pictures is no problem: each server, and each model opened by the bindings, uses a random one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mbq_gguf.errors import UsageError

SHOWN = 80  # characters of the text that an error shows


def check_text(words: str, special: Collection[str], place: str) -> None:
    """Raise UsageError, prefixed with ``place``, if ``words`` contain one of the tokens ``special`` or are not valid UTF-8."""
    try:
        words.encode()
    except UnicodeEncodeError as error:  # undecodable bytes of a command line, or a lone surrogate
        raise UsageError(f"{place}: {words[:SHOWN]!r} is not valid UTF-8: use UTF-8, in a UTF-8 locale or with PYTHONUTF8=1") from error
    found = max((token for token in special if token and token in words), key=len, default=None)
    if found:
        raise UsageError(f"{place}: {words[:SHOWN]!r} contains the model's special token {found}, which cannot be used as text: remove it")


def tokenizer_special_tokens(tokenizer: Any) -> frozenset[str]:
    """The special tokens of a transformers tokenizer."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*tokenizer.all_special_tokens, *added})
