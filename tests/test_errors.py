"""Every message to the user has one style: "what is wrong: what to do", lower case, no full stop."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("converter/mbq_gguf", "cbind/mbq_cbind", "tools")
NAMES = ("UserError", "UsageError", "BindingError", "CallError")


def literal(node: ast.expr) -> str:
    """The text of a string or f-string; what is put into it is shown as {}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def sentences() -> Iterator[tuple[str, str]]:
    """Place and text of each sentence that is written where its error is made."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in NAMES and literal(node.args[0]) != "{}":
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", literal(node.args[0])


def fault(text: str) -> str | None:
    """What a sentence has against it, or None."""
    first = text.split()[0]
    if first[0].isupper() and not first.isupper():  # MBQ_GGUF_LLAMA_CPP may begin one
        return "begins with a capital"
    if text.endswith((".", "!", ";")):
        return "ends with a full stop"
    if ": " not in text:
        return "does not say what to do after a colon"
    return None


def test_each_sentence_says_what_is_wrong_and_what_to_do() -> None:
    found = list(sentences())
    assert len(found) > 100, "the walk over the sources misses most of them"
    assert {place: f"{fault(text)}: {text}" for place, text in found if fault(text)} == {}


@pytest.mark.parametrize("text", ["The file is gone: fetch it", "the file is gone: fetch it.", "the file is gone; fetch it"])
def test_another_style_is_found(text: str) -> None:
    assert fault(text)
