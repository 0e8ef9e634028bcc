"""A short run of every fuzzer, and what long runs found, file by file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import upstream
from targets.table import LLAMA, READERS

HERE = Path(__file__).parent
TOOL = HERE.parents[1] / "tools" / "fuzz.py"
SECONDS = 300  # for a run of some 15, where much else runs beside it
INPUTS = {"header": 300, "inspect": 40, "jsonl": 800, "safetensors": 500, "workdir": 80, "picture": 500, "settings": 150}
LOADS = {"text": 150, "mmproj": 80, "decoder": 200}


def fuzz(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: children are forked, which torch's threads in this one would not survive."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment)


def test_every_target_has_its_share() -> None:
    assert INPUTS.keys() == READERS.keys()
    assert LOADS.keys() == LLAMA.keys()


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.usefixtures("built_llama")
def test_readers(kind: str, tmp_path: Path) -> None:
    done = fuzz(kind, "--count", str(INPUTS[kind]), "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}: {INPUTS[kind]} inputs" in done.stdout
    assert " 0 taken" not in done.stdout
    assert " 0 refused" not in done.stdout


@pytest.mark.parametrize("kind", LLAMA)
@pytest.mark.usefixtures("built_llama")
def test_loads(kind: str, tmp_path: Path) -> None:
    done = fuzz(kind, "--count", str(LOADS[kind]), "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 taken" not in done.stdout
    assert " 0 refused" not in done.stdout


def test_a_run_goes_on_and_an_input_can_be_made_again(tmp_path: Path) -> None:
    shared = fuzz("jsonl", "--count", "21", "--jobs", "2", "--out", tmp_path)
    assert shared.stdout.count("jsonl: 21 inputs") == 1
    states = [json.loads((tmp_path / f"jsonl-{seed}.json").read_text()) for seed in (0, 1)]
    assert [state["done"] for state in states] == [11, 10]
    assert states[0]["outcomes"] != {}
    assert "jsonl: 30 inputs" in fuzz("jsonl", "--count", "30", "--out", tmp_path).stdout
    shown = fuzz("jsonl", "--show", "7", "--out", tmp_path)
    again = fuzz("jsonl", "--read", tmp_path / "faults" / "jsonl-0-7")
    assert shown.stdout.split()[0] in ("taken", "refused")
    assert again.stdout == shown.stdout


@pytest.mark.parametrize("kind", ["text", "mmproj"])
@pytest.mark.usefixtures("built_llama")
def test_what_upstream_died_of_is_refused(kind: str, tmp_path: Path) -> None:
    """Each aborted the process or followed a null pointer; one process of three seconds reads them all, up to one that still does."""
    done = subprocess.run(
        [sys.executable, str(HERE / "upstream.py"), str(tmp_path), kind], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    outcomes = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    whole = {f"whole {fault.seed}" for fault in upstream.MENDED if fault.kind == kind}
    assert {name: outcomes.pop(name, "") for name in whole} == dict.fromkeys(whole, "taken"), done.stdout
    assert outcomes.keys() == {fault.name for fault in upstream.MENDED if fault.kind == kind}, done.stdout + done.stderr[-2000:]
    assert {name: said for name, said in outcomes.items() if not said.startswith("refused")} == {}
