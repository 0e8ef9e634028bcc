"""Progress and the first error, parsed from output of ninja, make, compilers and CMake; ending a process group."""

from __future__ import annotations

import io
import subprocess
import time
from pathlib import Path

import pytest
from mbq_gguf.llama_cpp.steps import BuildProgress, end_group, first_error
from rich.console import Console


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a.c: In function 'f':\na.c:3:5: error: 'x' undeclared\nb.c:1:1: error: later\n", "a.c:3:5: error: 'x' undeclared"),
        ("x.c:1:10: fatal error: y.h: No such file\n", "x.c:1:10: fatal error: y.h: No such file"),
        ('k.cu(7): error: identifier "z" is undefined\n', 'k.cu(7): error: identifier "z" is undefined'),
        ("ld: m.o: in function `main':\nm.c:(.text+0x5): undefined reference to `kernel'\n",
         "m.c:(.text+0x5): undefined reference to `kernel'"),
        ("CMake Error at CMakeLists.txt:3 (project):\n  No CMAKE_C_COMPILER could be found.\n\n  More.\n",
         "CMake Error at CMakeLists.txt:3 (project): No CMAKE_C_COMPILER could be found."),
        ("ninja: error: unknown target 'llama-server'\n", "ninja: error: unknown target 'llama-server'"),
        ("warning: an error-prone habit\n[3/9] Building C object error.o\n", None),
    ],
)  # fmt: skip
def test_first_error(output: str, expected: str | None) -> None:
    assert first_error(output) == expected


@pytest.mark.parametrize("style", ["[{done}/50] Building C object x.o\n", "[{percent:3d}%] Building C object x.o\n"])
def test_plain_lines_where_there_is_no_terminal(style: str) -> None:
    console = Console(file=io.StringIO(), width=120)
    with BuildProgress(console, "building") as progress:
        for done in range(1, 51):
            progress.line(style.format(done=done, percent=2 * done))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "building"
    assert 9 <= len(lines) - 1 <= 12
    assert all(": " in line and " of " in line for line in lines[1:])


def test_a_bar_with_the_time_left_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with BuildProgress(console, "building") as progress:
        progress.line("[30/60] Linking\n")
        progress.line("something that is no step\n")
    assert "30/60" in console.file.getvalue()


def test_the_group_may_end_its_own_processes_after_its_leader(tmp_path: Path) -> None:
    """A leader that ends at once, as cmake does, and a member that takes a while to pass the signal on, as ninja may."""
    member = f"trap 'sleep 0.3; touch {tmp_path}/passed-on; exit' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    leader = subprocess.Popen(["sh", "-c", 'sh -c "$0" & exec sleep 600', member], start_new_session=True, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    end_group(leader)
    assert (tmp_path / "passed-on").exists()


def test_a_group_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    script = f"trap '' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    end_group(leader, grace=0.2)
    assert leader.wait(timeout=5) == -9
