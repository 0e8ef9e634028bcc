"""A conversion killed at random moments and started again continues, and its files equal those of an undisturbed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from forked import Command, free_port, of_several
from golden import one_thread
from mbq_gguf.cli import main

SECONDS = 180  # for one run at most; it takes some 5 where nothing else runs
OPTIONS = ["--type", "MBQ3", "--rounding", "gptq", "--samples", "2", "--synthetic", "2", "--threads", "1"]


def convert(model: Path, folder: Path, *more: object) -> Command:
    """The conversion of ``model`` to ``folder``/out.gguf, started; what it says is beside ``folder``."""
    return Command(folder.with_suffix(".log"), "convert", model, folder / "out.gguf", *OPTIONS, *more)


def convert_together(count: int, model: Path, folder: Path) -> list[Command]:
    """The same by so many processes, as torchrun starts them; what process 0 says is where a single one's is."""
    arguments = ("convert", model, folder / "out.gguf", *OPTIONS)
    started = enumerate(of_several(count, free_port()))
    return [Command(folder.with_suffix(f".{rank}.log" if rank else ".log"), *arguments, variables=own) for rank, own in started]


def new_process(model: Path, folder: Path) -> list[str]:
    """The same as a command line, for a Python that starts from nothing."""
    return [sys.executable, "-m", "mbq_gguf", "convert", str(model), str(folder / "out.gguf"), *OPTIONS]


def finished_layers(folder: Path) -> int:
    return len(list(folder.glob("out.gguf.work/*/layer-*.safetensors")))


def await_layers(process: Command | subprocess.Popen[bytes], folder: Path, layers: int) -> None:
    """Until ``layers`` layers are kept in ``folder``, or ``process`` has ended."""
    deadline = time.monotonic() + SECONDS
    while finished_layers(folder) < layers:
        if isinstance(process, subprocess.Popen):
            process.poll()
        if process.returncode is not None:
            return
        assert time.monotonic() < deadline
        time.sleep(0.03)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def calm(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    made = tmp_path_factory.mktemp("calm")
    with one_thread():
        done = CliRunner().invoke(main, ["convert", str(tiny_dir), str(made / "out.gguf"), *OPTIONS])
    assert done.exit_code == 0, done.output
    return made


def same_files(folder: Path, calm: Path) -> bool:
    """Whether both files, and nothing else, are there and equal."""
    names = ["mmproj-out.gguf", "out.gguf"]
    assert sorted(path.name for path in folder.iterdir()) == names
    return all((folder / name).read_bytes() == (calm / name).read_bytes() for name in names)


def test_killed_runs_end_in_the_same_bytes(calm: Path, tiny_dir: Path, folder: Path) -> None:
    draw = random.Random(str(folder))  # other moments in every run; what is asserted holds for all of them
    for layers, sign in ((1, signal.SIGKILL), (2, signal.SIGTERM), (3, signal.SIGKILL)):
        process = convert(tiny_dir, folder)
        await_layers(process, folder, layers)
        time.sleep(draw.uniform(0, 0.5))
        process.send_signal(sign)
        process.wait(SECONDS)
        assert (folder / "out.gguf").exists() or finished_layers(folder) >= layers
    assert convert(tiny_dir, folder).wait(SECONDS) == 0
    assert same_files(folder, calm)


def test_one_of_two_processes_dies_and_one_alone_goes_on(calm: Path, tiny_dir: Path, folder: Path) -> None:
    """The other one ends with a sentence; what it has finished serves any number of processes (tests/test_parallel.py has three)."""
    first, second = convert_together(2, tiny_dir, folder)
    await_layers(first, folder, 1)
    second.send_signal(signal.SIGKILL)
    assert first.wait(SECONDS) == 1
    said = folder.with_suffix(".log").read_text()
    assert "error: another process of this run has ended" in said
    assert "Traceback" not in said
    assert finished_layers(folder) >= 1
    assert not (folder / "out.gguf").exists()
    assert not folder.with_suffix(".1.log").read_text()  # only the first process speaks
    assert convert(tiny_dir, folder).wait(SECONDS) == 0
    assert same_files(folder, calm)


@pytest.mark.usefixtures("built_llama")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda sign: sign.name)
def test_a_signal_tidies_up(sign: signal.Signals, tiny_dir: Path, folder: Path) -> None:
    """What stays is the finished work; the lock and every temporary name are gone, and the exit code says which signal it was."""
    process = convert(tiny_dir, folder, "--synthetic", 0)
    await_layers(process, folder, 1)
    assert process.returncode is None
    process.send_signal(sign)
    assert process.wait(SECONDS) == 128 + sign
    said = folder.with_suffix(".log").read_text()
    assert any(line.startswith("stopped: ") for line in said.splitlines())
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["out.gguf.work"]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_hang_up_that_is_ignored_stays_ignored(calm: Path, tiny_dir: Path, folder: Path) -> None:
    """As ``nohup`` has it: the run ends well although its terminal closed."""
    process = subprocess.Popen(["nohup", *new_process(tiny_dir, folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_layers(process, folder, 1)
    assert process.returncode is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(SECONDS) == 0
    assert same_files(folder, calm)


def test_the_second_run_to_one_file_is_refused(calm: Path, tiny_dir: Path, folder: Path) -> None:
    first = convert(tiny_dir, folder)
    await_layers(first, folder, 1)
    first.send_signal(signal.SIGSTOP)  # or a slow start of the second would let it end
    second = subprocess.run(
        [*new_process(tiny_dir, folder), "--type", "Q4_0"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    first.send_signal(signal.SIGCONT)
    assert first.wait(SECONDS) == 0
    assert second.returncode == 2
    assert f"another mbq-gguf is writing {folder / 'out.gguf'}" in second.stderr.replace("\n", " ")
    assert same_files(folder, calm)
