"""tools/bench_texts.py: both variants in each round, beside a process that has ended afterwards."""

from __future__ import annotations

import re
from pathlib import Path

import bench_texts
import pytest
from click.testing import CliRunner


def test_it_writes_alone_and_beside_a_process_that_ends(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bench_texts.FORCED, "passive")  # no second start: how threads wait is not what is tested
    started = []
    popen = bench_texts.subprocess.Popen
    monkeypatch.setattr(bench_texts.subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1])
    done = CliRunner().invoke(bench_texts.main, [str(tiny_dir), "--texts", "2", "--tokens", "3", "--rounds", "2"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        r"2 texts, 3 tokens each, threads wait passive: alone [\d.]+ s, beside 1 busy thread [\d.]+ s; ratio [\d.]+ \([\d.]+, [\d.]+\)\n",
        done.output,
    )
    assert [process.returncode for process in started] == [-9, -9]
