"""Classes of answer tokens."""

from __future__ import annotations

import pytest
from mbq_gguf.evaluate.classes import COLOURS_POSITIONS, DIGITS, END, WORDS, token_classes


@pytest.mark.parametrize(
    ("pieces", "classes"),
    [
        ([], [END]),
        (["four"], [WORDS, END]),
        (["4", "8"], [DIGITS, DIGITS, END]),
        (["room", " 1", "2b"], [WORDS, DIGITS, DIGITS, END]),
        (["top", " left"], [COLOURS_POSITIONS, COLOURS_POSITIONS, END]),
        (["a", " crim", "son", " ring"], [WORDS, COLOURS_POSITIONS, COLOURS_POSITIONS, WORDS, END]),
        ([" Red", ",", " predict", "ed"], [COLOURS_POSITIONS, WORDS, WORDS, WORDS, END]),  # "red" inside a word is no colour
    ],
)
def test_token_classes(pieces: list[str], classes: list[str]) -> None:
    assert token_classes(pieces) == classes
