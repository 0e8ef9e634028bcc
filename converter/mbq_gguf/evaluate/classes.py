"""Classifies answer tokens: digits (read from the picture), colours and positions (seen), other words, and the end of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

DIGITS = "digits"
COLOURS_POSITIONS = "colours and positions"
WORDS = "words"
END = "end of answer"
CLASSES = (WORDS, DIGITS, COLOURS_POSITIONS, END)

COLOURS = """
    black white gray grey silver red maroon pink magenta crimson orange brown beige tan gold golden yellow olive lime green teal turquoise
    cyan blue navy purple violet indigo
"""
POSITIONS = """
    left right top bottom center centre middle upper lower above below over under beside between behind front inside outside corner
    leftmost rightmost topmost bottommost foreground background
"""
SEEN = frozenset(COLOURS.split()) | frozenset(POSITIONS.split())
WORD = re.compile(r"[^\W\d_]+")


def token_classes(pieces: Sequence[str]) -> list[str]:
    """The class of each answer token; ``pieces`` are the texts of the answer's tokens, without the one that ends the turn, which gets END.

    A token has the class of the word that it is part of: "crim" in "crimson" is a colour. A token with a digit is a digit.
    Returns len(pieces) + 1 classes.
    """
    text = "".join(pieces)
    seen = [match.span() for match in WORD.finditer(text) if match.group().casefold() in SEEN]
    classes: list[str] = []
    start = 0
    for piece in pieces:
        end = start + len(piece)
        if any(character.isdigit() for character in piece):
            classes.append(DIGITS)
        elif any(first < end and start < last for first, last in seen):
            classes.append(COLOURS_POSITIONS)
        else:
            classes.append(WORDS)
        start = end
    return [*classes, END]
