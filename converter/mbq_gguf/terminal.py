"""Makes output safe in locales without Unicode (``LC_ALL=C`` without Python's UTF-8 mode) and for file names that are not valid UTF-8.

The characters of tables and bars get ASCII replacements, anything else is escaped, and nothing raises UnicodeEncodeError.
"""

from __future__ import annotations

import codecs
import sys

BARS = "▁▂▃▄▅▆▇█"  # in the table of inspect, lowest to highest
SIGNS = {**{bar: str(height) for height, bar in enumerate(BARS, 1)}, "×": "x", "–": "-", "·": ".", "…": "~", "±": "+-"}
SPINNER = range(0x2800, 0x2900)  # Braille, which rich's spinner uses


def allow_any_encoding() -> None:
    """Make standard output and error accept any text, whatever their encoding."""
    codecs.register_error("mbq_gguf.signs", _signs)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # callers may have replaced the streams by other kinds
            stream.reconfigure(errors="mbq_gguf.signs")


def _signs(error: UnicodeError) -> tuple[str, int]:
    """A :mod:`codecs` error handler for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_sign, error.object[error.start : error.end])), error.end


def _sign(character: str) -> str:
    return "." if ord(character) in SPINNER else SIGNS.get(character) or ascii(character)[1:-1]
