"""What is said where the locale has no Unicode (``LC_ALL=C`` with Python's UTF-8 mode off) or a file's name is no UTF-8: ASCII for
the signs that tables and bars are drawn with, an escape for anything else, and never a traceback."""

from __future__ import annotations

import codecs
import sys

BARS = "▁▂▃▄▅▆▇█"  # of inspect's table, lowest to highest
SIGNS = {**{bar: str(height) for height, bar in enumerate(BARS, 1)}, "×": "x", "–": "-", "·": ".", "…": "~", "±": "+-"}
SPINNER = range(0x2800, 0x2900)  # Braille, of which rich turns a wheel


def speak_everywhere() -> None:
    """Let standard output and error take any text, whatever their encoding."""
    codecs.register_error("mbq_gguf.signs", _signs)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a program that calls the command may have put another kind of stream there
            stream.reconfigure(errors="mbq_gguf.signs")


def _signs(error: UnicodeError) -> tuple[str, int]:
    """A handler of :mod:`codecs` for what an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_sign, error.object[error.start : error.end])), error.end


def _sign(character: str) -> str:
    return "." if ord(character) in SPINNER else SIGNS.get(character) or ascii(character)[1:-1]
