"""tools/trial_rows.py: every row can be made, and a run makes those that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trial_quality as trial
import trial_rows
import trial_w4a8
from click.testing import CliRunner
from mbq_gguf.calibration.dataset import read_jsonl
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.registry import names
from mbq_gguf.rounding import nearest, sequence
from mbq_gguf.transforms import candidate


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


@pytest.mark.slow
def test_a_run_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "rows.jsonl", [f"samples=1,synthetic=0,refits={refits},clip=False" for refits in (0, 1)]
    command = [str(tiny_dir), str(out), "--questions", "2", "--seconds", "100"]
    for only in (rows[:1], rows):
        done = CliRunner().invoke(trial_rows.main, [*command, *(word for row in only for word in ("--only", row))])
        assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in found] == rows
    assert all(row["scenes"]["asked"] == 2 and row["scenes"]["kld"] > 0 for row in found)


@pytest.fixture
def trial_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two trial codes known here, and forgotten afterwards."""
    monkeypatch.setattr(row_scale, "QUANT_TYPES", row_scale.QUANT_TYPES)
    for module in (sequence, candidate, nearest):
        monkeypatch.setattr(module, "grid_of", module.grid_of)  # type: ignore[attr-defined]
    kept = dict(row_scale.QUANT_TYPES)
    trial_w4a8.register()
    yield
    row_scale.QUANT_TYPES.clear()
    row_scale.QUANT_TYPES.update(kept)


def test_rows_of_w4a8_are_settings(trial_codes: None) -> None:
    variants = [trial.parsed(row) for row in trial_w4a8.ROWS]
    assert len(set(trial_w4a8.ROWS)) == len(variants)
    assert {variant.settings.method for variant in variants} == {"rtn", "smoothquant", "awq", "mbq"}
    assert {variant.settings.type_name for variant in variants} <= {*names(), "W4A8_ZERO", "W4A8_TWO"}


@pytest.mark.parametrize("name", ["W4A8_ZERO", "W4A8_TWO"])
def test_trial_codes_keep_what_their_grid_gives(trial_codes: None, name: str) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 192), dtype=np.float32)
    kind = row_scale.for_rows(name, 192)
    values = kind.dequantize(kind.quantize(weights))
    if name == "W4A8_ZERO":
        assert all(len(np.unique(row)) <= 16 for row in values)
        found = [np.diff(np.unique(row)) for row in values]
        assert all(np.allclose(steps / steps.min(), np.rint(steps / steps.min()), atol=1e-3) for steps in found)
    else:  # products of an int4 scale and a code are whole multiples, of an int8's size, of one scale per row
        grid = trial_w4a8.trial_grid(kind)
        assert grid is not None
        assert (grid.scale.high or 0) * -grid.low < 128
        assert max(len(np.unique(group)) for group in values.reshape(-1, 64)) <= 16
    plain = row_scale.for_rows("W4A8", 192)
    assert np.square(values - weights).sum() < np.square(plain.dequantize(plain.quantize(weights)) - weights).sum()


def test_what_int8_adds_is_a_share_with_its_interval() -> None:
    drawn = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    found = trial_w4a8.added(list(drawn), list(drawn * 1.25))
    assert found == pytest.approx({"added": 0.25, "from": 0.25, "to": 0.25})
    noisy = trial_w4a8.added(list(drawn), list(drawn * 1.25 + 0.2 * drawn.roll(1)))
    assert noisy["from"] < noisy["added"] < noisy["to"]


@pytest.mark.slow
def test_rows_with_one_scale_a_row_are_scored_with_int8_too(tiny_dir: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "rows.jsonl", "rounding=nearest,synthetic=0,samples=1"
    rows = [f"type_name=W4A8,{plain},method=smoothquant", f"type_name=Q4_0,{plain}"]
    words = [word for row in rows for word in ("--only", row)]
    done = CliRunner().invoke(trial_rows.main, [str(tiny_dir), str(out), "--questions", "2", "--seconds", "100", *words])
    assert done.exit_code == 0, done.output
    found = {row["row"]: row["scenes"] for row in map(json.loads, out.read_text().splitlines())}
    assert set(found) == set(rows)
    assert found[rows[0]]["int8"]["kld"] != found[rows[0]]["kld"]
    assert "int8" not in found[rows[1]]
