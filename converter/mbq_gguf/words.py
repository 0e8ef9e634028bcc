"""What people say to a model is text: where it names one of the model's special tokens it is refused, everywhere alike.

llama-server cuts a whole conversation into tokens at once, the words of its user included, and so does transformers: ``<|im_end|>`` in a
question ends the turn, ``<|image_pad|>`` stands for a piece of a picture that is not there. Neither can be told to read it as text, so a
set, a question or an answer that holds one is not calibrated, measured or asked. libmtmd's marker for pictures is no such token: each
server, and each model opened through the bindings, draws one that nobody foresees.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mbq_gguf.errors import UsageError

SHOWN = 80  # characters of what was said


def check_words(words: str, special: Collection[str], place: str) -> None:
    """Raise UsageError, which begins with ``place``, where ``words`` name one of the tokens ``special`` or are no text at all."""
    try:
        words.encode()
    except UnicodeEncodeError as error:  # bytes of a command line or half a pair of surrogates
        raise UsageError(
            f"{place}: {words[:SHOWN]!r} is no text in UTF-8: write it again in UTF-8, in a UTF-8 locale or with PYTHONUTF8=1"
        ) from error
    found = max((token for token in special if token and token in words), key=len, default=None)
    if found:
        raise UsageError(f"{place}: {words[:SHOWN]!r} holds the model's special token {found}, which is not read as text: take it out")


def tokenizer_specials(tokenizer: Any) -> frozenset[str]:
    """The special tokens of a tokenizer of transformers."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*tokenizer.all_special_tokens, *added})
