"""tools/trial_rows.py: every row can be made, and a run makes those that its file lacks."""

from __future__ import annotations

import json
from pathlib import Path

import trial_quality as trial
import trial_rows
from click.testing import CliRunner
from mbq_gguf.calibration.dataset import read_jsonl


def test_every_row_is_a_setting_and_has_two_seeds() -> None:
    assert len(set(trial_rows.ROWS)) == len(trial_rows.ROWS)
    variants = [trial.parsed(row) for row in trial_rows.ROWS]
    assert {variant.calib for variant in variants} == {"", "captions"}
    seen = [(variant.settings, variant.calib, variant.turns) for variant in variants if variant.settings.method != "rtn" or variant.seed]
    assert {variant.seed for variant in variants} == {0, 1}
    assert all(seen.count(what) <= 2 for what in seen)


def test_captions_are_the_descriptions(tmp_path: Path) -> None:
    samples = read_jsonl(trial_rows.captions(tmp_path))
    assert len(samples) == 101
    assert all(len(sample.turns) == 1 and sample.image.is_file() for sample in samples)
    assert {sample.turns[0][0] for sample in samples} == {"List the objects from left to right."}


def test_a_run_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "rows.jsonl", [f"samples=1,synthetic=0,refits={refits},clip=False" for refits in (0, 1)]
    command = [str(tiny_dir), str(out), "--questions", "2", "--seconds", "100"]
    for only in (rows[:1], rows):
        done = CliRunner().invoke(trial_rows.main, [*command, *(word for row in only for word in ("--only", row))])
        assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in found] == rows
    assert all(row["scenes"]["asked"] == 2 and row["scenes"]["kld"] > 0 for row in found)
