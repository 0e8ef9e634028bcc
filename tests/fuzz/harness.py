"""Runs a target on inputs FIRST to LAST in a child process, which is forked again if it crashes, hangs, or has run for long.

An input is made from the target's name, the seed and its number alone, so each can be made again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import frames
from targets import REFUSED, TAKEN, Target

HANG_SECONDS = 20  # of processor time for one input, which other work on the machine does not use up ...
WALL_SECONDS = 300  # ... and of the clock, for those that wait for ever
MEMORY = 8 << 30  # bytes of addresses, libraries and model included
SERVED = 3000  # inputs of one child: what leaks must not fill the machine
LETTERS = {"t": TAKEN, "r": REFUSED}


@dataclass(frozen=True)
class Outcome:
    """What came of input ``index``: "taken", "refused" or "fault", with the signature of the fault and all that was said."""

    index: int
    what: str
    signature: str = ""
    text: str = ""


def draw_for(name: str, seed: int, index: int) -> random.Random:
    """The draw that makes one input."""
    return random.Random(f"{name} {seed} {index}")


def run(target: Target, name: str, seed: int, first: int, last: int) -> Iterator[Outcome]:
    """One outcome for every number from ``first`` to ``last`` (not included), in order."""
    index = first
    target.open()  # before any child: libraries are loaded once
    with tempfile.TemporaryDirectory(prefix="fuzz-") as kept, tempfile.TemporaryFile() as errors:
        stack, folder = frames.compile_into(Path(kept)), Path(kept) / "input"
        folder.mkdir()
        while index < last:
            end = min(last, index + SERVED)
            errors.seek(0)
            errors.truncate()
            child = _Child(target, name, seed, index, end, folder, errors.fileno(), stack)
            for outcome in child.outcomes():
                index = outcome.index + 1
                yield outcome
            if index < end:
                yield Outcome(index, "fault", *child.last_words(os.pread(errors.fileno(), 1 << 20, 0).decode(errors="replace")))
                index += 1


class _Child:
    """A process that reads inputs one after another and tells a letter for each."""

    def __init__(self, target: Target, name: str, seed: int, first: int, last: int, folder: Path, errors: int, stack: Path | None) -> None:
        self.index = first
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reader)
            os.dup2(errors, 2)
            status = 1
            try:
                frames.install(stack)
                _serve(target, name, seed, first, last, folder, writer)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        self.hung = self.ended = False

    def outcomes(self) -> Iterator[Outcome]:
        """Until the child has read all, is dead, or is killed since it hangs."""
        left = ""
        try:
            while True:
                ready = self._wait()
                chunk = os.read(self.reader, 1 << 16).decode() if ready else ""
                if not chunk:
                    self.ended = ready
                    break
                *lines, left = (left + chunk).split("\n")
                for line in lines:
                    what = LETTERS.get(line)
                    told = {"signature": "", "text": ""} if what else json.loads(line)
                    yield Outcome(self.index, what or "fault", **told)
                    self.index += 1
        finally:
            os.close(self.reader)
            if not self.ended:  # it hangs, or nobody wants to know more
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]

    def last_words(self, text: str) -> tuple[str, str]:
        """Signature and text of the child's end."""
        if self.hung:
            return "hang", text
        if os.WIFSIGNALED(self.status):
            return frames.signature(text, signal.Signals(os.WTERMSIG(self.status)).name), text
        return f"exit {os.waitstatus_to_exitcode(self.status)} {text.strip().splitlines()[-1] if text.strip() else ''}", text

    def _wait(self) -> bool:
        """Wait for a word; False if the child hangs."""
        began, used = time.monotonic(), _seconds(self.pid)
        while not select.select([self.reader], [], [], 1)[0]:
            if _seconds(self.pid) - used > HANG_SECONDS or time.monotonic() - began > WALL_SECONDS:
                self.hung = True
                return False
        return True


def _serve(target: Target, name: str, seed: int, first: int, last: int, folder: Path, writer: int) -> None:
    """The child's work."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["GGML_NO_BACKTRACE"] = "1"
    for index in range(first, last):
        target.make(draw_for(name, seed, index), clean(folder))
        try:
            word = target.read(folder)[0]
        except Exception as error:
            last_frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} | {Path(last_frame.filename).name}: {last_frame.name}"
            word = json.dumps({"signature": where, "text": traceback.format_exc()[-4000:]})
        os.write(writer, f"{word}\n".encode())


def clean(folder: Path) -> Path:
    """``folder`` without what the last input left there."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return folder


def _seconds(pid: int) -> float:
    """Processor time of a child so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
