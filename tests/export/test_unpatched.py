"""Files with stock types run in an unpatched llama.cpp: upstream's, from the wheel of xllamacpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from rich.console import Console

pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this platform")
ASKED = 6


def ask(model: Path, mmproj: Path) -> subprocess.CompletedProcess[str]:
    questions = [(str(question.image), question.question) for question in load_questions(SHIPPED)[:ASKED]]
    command = [sys.executable, str(Path(__file__).with_name("ask_unpatched.py")), str(model), str(mmproj)]
    return subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, check=False)


def test_a_rotated_file_of_stock_types_answers(reference_dir: Path, tmp_path: Path) -> None:
    """Q3_K with rotations folded in (rows of 576 are Q4_0), the tower's too: at most one question of six lost by rounding to nearest."""
    rotated = {"rotate": "offline", "rotate_tower": True}
    options = ConvertOptions(reference_dir, tmp_path / "out.gguf", type="Q3_K", method="rtn", rounding="nearest", **rotated)
    convert(options, Console(quiet=True))
    done = ask(options.out, options.mmproj)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    right = [given == question.expected for given, question in zip(answers, load_questions(SHIPPED)[:ASKED], strict=True)]
    assert sum(right) >= ASKED - 1, answers


def test_a_file_of_our_types_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """What the first test means: this llama.cpp knows nothing of ours."""
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", type="MBQ3S", method="rtn", rounding="nearest")
    convert(options, Console(quiet=True))
    assert ask(options.out, options.mmproj).returncode != 0
