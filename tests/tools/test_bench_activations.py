"""tools/bench_activations.py: a real round on one layer, with a library in which one file of the build is replaced."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import activations
import bench_activations
import pytest
from click.testing import CliRunner
from mbq_gguf.llama_cpp.paths import find_program
from relinked import relink


@pytest.mark.slow
def test_what_quantising_costs(built_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--layers", "1", "--rounds", "2", "--prompt", "128", "--threads", "1"]
    done = CliRunner().invoke(bench_activations.main, [*arguments, "--work", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["prompts"]
    assert [row["activations"] for row in rows] == ["dynamic", "static", "skipped"]
    assert rows[0]["ratios"] == [1.0, 1.0]


@pytest.mark.slow
def test_programs_take_the_library_that_was_linked_again(built_llama: Path, tmp_path: Path) -> None:
    bench = find_program("llama-bench")
    environment = relink(bench.parents[1], "ggml-cpu", tmp_path / "skipped", activations.HERE / "skipped" / "row-scale.cpp")
    taken = subprocess.run(["ldd", bench], env=environment, capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path / 'skipped'}/libggml-cpu" in taken
    plain = subprocess.run(["ldd", bench], capture_output=True, text=True, check=True).stdout
    assert f"{bench.parent}/libggml-cpu" in plain
