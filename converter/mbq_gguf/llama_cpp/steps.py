"""Runs one step of a build: output goes to the log, progress to the screen, and the first error into one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbq_gguf.errors import UserError

NINJA_STATUS = "[%f/%t] "
_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
_MAKE_STEP = re.compile(r"^\[ *(\d+)%\] ")
_ERRORS = (
    re.compile(r"^.*?\b(?:fatal )?error ?(?:[A-Z]*\d+)?: .*$", re.MULTILINE),  # GCC, Clang, nvcc
    re.compile(r"^.*\bundefined reference to .*$", re.MULTILINE),
    re.compile(r"^CMake Error[^\n]*\n+\s*[^\n]+$", re.MULTILINE),
    re.compile(r"^(?:nvcc|ptxas|ld|ninja|make).*(?:fatal|error|stopped).*$", re.MULTILINE | re.IGNORECASE),
)


def say(console: Console, text: str) -> None:
    """Print one line literally: without interpreting markup or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class BuildProgress:
    """A progress bar with the remaining time on a terminal, else one plain line every 10 %."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._next_report = 0.0
        self._task: TaskID | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None

    def __enter__(self) -> BuildProgress:
        if self._bar is None:
            say(self._console, self._title)
        else:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Read the step count of ninja ([3/200]) or make ([ 12%]) from one line of output."""
        ninja, make = _NINJA_STEP.match(text), _MAKE_STEP.match(text)
        if ninja:
            self._move(int(ninja[1]), int(ninja[2]))
        elif make:
            self._move(int(make[1]), 100)

    def _move(self, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done / total >= self._next_report:
            say(self._console, f"{self._title}: {done} of {total}")
            self._next_report = done / total + 0.1


def run_step(command: Sequence[str | Path], log: TextIO, on_line: Callable[[str], None], extra: Mapping[str, str] | None = None) -> None:
    """Run `command` and pass every line of output to `log` and `on_line`; on any exception, its whole process group is ended first.

    Raises UserError if it fails: one sentence with the first error line and the log's path.
    """
    start = log.tell()
    log.write(f"$ {' '.join(map(str, command))}\n")
    environment = {**os.environ, "LC_ALL": "C", "NINJA_STATUS": NINJA_STATUS, **(extra or {})}
    # In a new session, so that Ctrl-C reaches only this process, which then ends the compilers and waits for them before it cleans up.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            on_line(line)
        code = process.wait()
    finally:
        end_group(process)
        process.stdout.close()
        log.flush()
    if code != 0:
        raise _failure(Path(log.name), start)


def end_group(process: subprocess.Popen[str], grace: float = 5.0) -> None:
    """End a process that leads its own group, and everything in the group: SIGTERM, then SIGKILL after `grace` seconds.

    Does nothing if the process has already ended, because its group id may have been reused.
    """
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        # Wait for the group, not only for its leader: ninja puts each compiler into its own group and forwards SIGTERM to them. A SIGKILL
        # as soon as cmake, its parent, has ended would prevent that, and the compilers would keep running.
        if _group_ended(process, grace):
            return


def _group_ended(process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait until the group of `process` is empty, for at most `seconds`; returns whether it is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()  # reap the leader, which counts as a member until then
        try:
            os.killpg(process.pid, 0)  # signal 0 only checks for existence
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.02)
    return False


def first_error(text: str) -> str | None:
    """The first line of compiler, linker or CMake output that states an error; None if none does."""
    for pattern in _ERRORS:
        found = pattern.search(text)
        if found:
            return " ".join(found[0].split())
    return None


def _failure(log: Path, start: int) -> UserError:
    with log.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(start)
        text = stream.read()
    if "No space left on device" in text:
        return disk_full(log.parents[1])
    if "Killed signal terminated program" in text or "Killed (program" in text:
        return UserError(f"the compiler ran out of memory: build again with fewer at once, for example `--jobs 1` (the log is {log})")
    reason = first_error(text) or (text.strip().splitlines() or ["no output"])[-1]
    return UserError(f"the build of llama.cpp failed ({reason}): see the whole log in {log}")


def disk_full(folder: Path) -> UserError:
    """The error for a full disk under the cache folder."""
    return UserError(f"the disk that holds {folder} is full: free about 2 GB there, or set MBQ_GGUF_CACHE to a folder on another disk")
