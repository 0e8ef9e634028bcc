"""The command killed at random moments and started again: it goes on, and the files are those of an undisturbed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 180  # for one run at most; it takes some 15 where nothing else runs


def command(model: Path, out: Path) -> list[str]:
    options = ["--type", "MBQ3", "--rounding", "gptq", "--samples", "2", "--synthetic", "4", "--threads", "1"]
    return [sys.executable, "-m", "mbq_gguf", "convert", str(model), str(out), *options]


def finished_layers(folder: Path) -> int:
    return len(list(folder.glob("out.gguf.work/*/layer-*.safetensors")))


def stop_after(model: Path, folder: Path, layers: int, delay: float, sign: signal.Signals) -> None:
    """Start the command and send ``sign`` ``delay`` seconds after ``layers`` layers are kept, unless it ends before."""
    process = subprocess.Popen(command(model, folder / "out.gguf"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while finished_layers(folder) < layers and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(sign)
    process.wait(SECONDS)


@pytest.mark.usefixtures("built_llama")
def test_killed_runs_end_in_the_same_bytes(tiny_dir: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    subprocess.run(command(tiny_dir, calm / "out.gguf"), check=True, capture_output=True, timeout=SECONDS)
    draw = random.Random(str(tmp_path))  # other moments in every run; what is asserted holds for all of them
    for layers, sign in ((1, signal.SIGKILL), (2, signal.SIGTERM), (3, signal.SIGKILL)):
        stop_after(tiny_dir, killed, layers, draw.uniform(0, 0.5), sign)
        assert (killed / "out.gguf").exists() or finished_layers(killed) >= layers
    subprocess.run(command(tiny_dir, killed / "out.gguf"), check=True, capture_output=True, timeout=SECONDS)
    assert sorted(path.name for path in killed.iterdir()) == ["mmproj-out.gguf", "out.gguf"]
    for name in ("out.gguf", "mmproj-out.gguf"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
