"""The command killed at random moments and started again: it goes on, and the files are those of an undisturbed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SECONDS = 180  # for one run at most; it takes some 15 where nothing else runs


def command(model: Path, out: Path) -> list[str]:
    options = ["--type", "MBQ3", "--rounding", "gptq", "--samples", "2", "--synthetic", "4", "--threads", "1"]
    return [sys.executable, "-m", "mbq_gguf", "convert", str(model), str(out), *options]


def finished_layers(folder: Path) -> int:
    return len(list(folder.glob("out.gguf.work/*/layer-*.safetensors")))


def await_layers(process: subprocess.Popen[Any], folder: Path, layers: int) -> None:
    """Until ``layers`` layers are kept in ``folder``, or ``process`` has ended."""
    deadline = time.monotonic() + SECONDS
    while finished_layers(folder) < layers and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_after(model: Path, folder: Path, layers: int, delay: float, sign: signal.Signals) -> None:
    """Start the command and send ``sign`` ``delay`` seconds after ``layers`` layers are kept, unless it ends before."""
    process = subprocess.Popen(command(model, folder / "out.gguf"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_layers(process, folder, layers)
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


@pytest.mark.usefixtures("built_llama")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda sign: sign.name)
def test_a_signal_tidies_up(sign: signal.Signals, tiny_dir: Path, tmp_path: Path) -> None:
    """What stays is the finished work; the lock and every temporary name are gone, and the exit code says which signal it was."""
    process = subprocess.Popen(
        command(tiny_dir, tmp_path / "out.gguf"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(sign, signal.SIG_DFL),  # the suite may ignore it (nohup, a job)
    )
    await_layers(process, tmp_path, 1)
    assert process.poll() is None
    process.send_signal(sign)
    error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 128 + sign
    assert error.startswith("stopped: ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.work"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.usefixtures("built_llama")
def test_a_hang_up_that_is_ignored_stays_ignored(tiny_dir: Path, tmp_path: Path) -> None:
    """As ``nohup`` has it: the run ends well although its terminal closed."""
    process = subprocess.Popen(["nohup", *command(tiny_dir, tmp_path / "out.gguf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_layers(process, tmp_path, 1)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(SECONDS) == 0


@pytest.mark.usefixtures("built_llama")
def test_the_second_run_to_one_file_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with subprocess.Popen(command(tiny_dir, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + SECONDS
        while not finished_layers(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # or a slow start of the second would let it end
        second = subprocess.run([*command(tiny_dir, out), "--type", "Q4_0"], capture_output=True, text=True, timeout=SECONDS, check=False)
        first.send_signal(signal.SIGCONT)
        assert first.wait(SECONDS) == 0
    assert second.returncode == 2
    assert f"another mbq-gguf is writing {out}" in second.stderr.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmproj-out.gguf", "out.gguf"]
