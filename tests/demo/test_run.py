"""The demo's own parts; ``make demo`` runs all of it."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from mbq_gguf.demo.assemble import WEIGHTS
from mbq_gguf.demo.run import TASKS, answers, comparison, converted, demo_questions, fingerprint
from rich.console import Console


def test_the_three_questions_are_about_three_pictures() -> None:
    questions = demo_questions()
    assert [question.task for question in questions] == list(TASKS)
    assert len({question.image for question in questions}) == 3


def test_the_fingerprint_follows_model_and_type(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"one")
    first = fingerprint(tmp_path, "MBQ3")
    assert fingerprint(tmp_path, "MBQ3") == first
    assert fingerprint(tmp_path, "BF16") != first
    (tmp_path / WEIGHTS).write_bytes(b"two")
    assert fingerprint(tmp_path, "MBQ3") != first


def test_a_file_is_converted_once_and_again_when_the_model_changes(
    tiny_dir: Path, tmp_path: Path, built_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    console, out = Console(), tmp_path / "tiny-BF16.gguf"
    files = converted(model, out, "BF16", console)
    assert files.text == out
    assert files.mmproj.is_file()
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    assert converted(model, out, "BF16", console) == files
    assert "is there already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with (model / WEIGHTS).open("r+b") as file:  # the last weight of the last tensor
        file.seek(-2, 2)
        file.write(b"\x00\x3f")
    converted(model, out, "BF16", console)
    assert out.stat().st_mtime_ns > before


def test_the_originals_answers_stand_beside_the_small_ones(tiny_dir: Path, tmp_path: Path, built_llama: Path) -> None:
    questions = demo_questions()
    files = converted(tiny_dir, tmp_path / "tiny-BF16.gguf", "BF16", Console(file=io.StringIO()))
    said = answers(files, questions, Console(file=io.StringIO()))
    assert len(said) == 3
    right = [question.expected for question in questions]
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison(questions, {"BF16": right, "MBQ3S": [f"[{right[0]}]", *right[1:]]}))
    printed = console.file.getvalue()
    assert printed.count("(wrong)") == 1
    assert f"[{right[0]}] (wrong)" in printed
