"""tools/bench_cpu.py: one real round on one layer, and the table made from its results."""

from __future__ import annotations

import json
from pathlib import Path

import bench_cpu
import pytest
from click.testing import CliRunner


def test_one_round(built_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--types", "Q3_K,MBQ3", "--layers", "1", "--rounds", "1", "--prompt", "8", "--generate", "1", "--threads", "1"]
    done = CliRunner().invoke(bench_cpu.main, [*arguments, "--work", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["MBQ3"]["bits_per_weight"] == 3.25
    assert rows["Q3_K"]["generation_ratio"] == rows["Q3_K"]["prompt_ratio"] == 1.0
    assert found["bandwidth"] > 0
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["random-1-MBQ3.gguf", "random-1-Q3_K.gguf"]


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "bits_per_weight", lambda model: 3.25)
    speeds = {"Q3_K": [10.0, 20.0, 40.0], "MBQ3": [15.0, 30.0, 80.0]}  # a machine that gets quicker
    results = [
        {"name": name, "round": number, "avg_ts": speed, "n_gen": n_gen, "n_prompt": 8 - n_gen, "model_size": 100}
        for name, values in speeds.items()
        for number, speed in enumerate(values)
        for n_gen in (0, 8)
    ]
    base, mine = bench_cpu.tabulate({name: Path(name) for name in speeds}, results, bandwidth=4000.0)
    assert (base.generation_ratio, base.prompt_ratio) == (1.0, 1.0)
    assert (mine.generation_ratio, mine.prompt_ratio) == (1.5, 1.5)
    assert mine.generation == 30.0
    assert mine.generation_spread == pytest.approx(65 / 30)
    assert mine.bandwidth_share == pytest.approx(0.75)


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(bench_cpu.main, ["--types", "Q3_K,Q9"])
    assert done.exit_code == 2
    assert "leave out Q9" in done.output
