"""tools/profile_tower.py: how a profile is read, and that the profiled passes run; times on a GPU need one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_ttft
import profile_tower
import pytest
import random_gguf
from mbq_gguf.llama_cpp.bindings import bind


def test_what_the_card_did_and_when_it_did_nothing() -> None:
    """Kernels in any order, one within another, a copy behind a gap; what the host does is left out."""
    trace = [
        {"cat": "kernel", "name": "void second<4>(int)", "ts": 1000.0, "dur": 2000.0},
        {"cat": "kernel", "name": "first", "ts": 0.0, "dur": 1500.0},
        {"cat": "kernel", "name": "void second<8>(int)", "ts": 1200.0, "dur": 100.0},
        {"cat": "cpu_op", "name": "host", "ts": -900.0, "dur": 90000.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 3500.0, "dur": 500.0},
    ]
    found = profile_tower.of_events(trace)
    assert (found["card"], found["idle"], found["count"]) == (4.0, 0.5, 4)
    assert found["kernels"] == [
        {"kernel": "second", "ms": 2.1, "count": 2},
        {"kernel": "first", "ms": 1.5, "count": 1},
        {"kernel": "Memcpy DtoH ", "ms": 0.5, "count": 1},
    ]


def test_towers_and_prompts_run(built_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time of one run in the place of a profile."""
    bind()
    monkeypatch.setattr(random_gguf, "TOWER", (1, 160))
    monkeypatch.setattr(profile_tower, "SIDES", {64: 224})
    monkeypatch.setitem(bench_ttft.SHAPES, "2B", random_gguf.LanguageShape(1, 256, 512, 2, 1, 0))

    def once(run: Callable[[], float], _trace: Path, before: Callable[[], object] = lambda: None) -> dict[str, float]:
        before()
        return {"call": run()}

    monkeypatch.setattr(profile_tower, "profiled", once)
    found = dict(profile_tower.towers(tmp_path, ["F16", "W8A8", "W8A8:dynamic"], 256)) | dict(profile_tower.prompts(tmp_path, ["2B:W4A8"]))
    assert list(found) == ["F16, 64 tokens", "W8A8, 64 tokens", "W8A8:dynamic, 64 tokens", "2B:W4A8, a picture of 64 tokens"]
    assert all(times["call"] > 0 for times in found.values())
