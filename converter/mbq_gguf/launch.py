"""Whether this process is one of several that torchrun started to convert one model together, and which. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mbq_gguf.errors import UsageError

SAME = 15.0  # seconds that the others leave the first process to say what is wrong, since most errors are everybody's
STUCK = 20.0  # seconds in which a process that was told to end does so by itself, unless it waits for a dead one in a collective call
ENDED = (
    "another process of this run has ended, or all were told to end: no partial files are left, and the same command, with any number of "
    "processes, resumes from the last finished layer"
)


def count() -> int:
    """How many processes work together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this is. Number 0, the first, alone writes, and speaks for all."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def first() -> bool:
    """Whether this is the first process, or the only one."""
    return rank() == 0


def neighbours() -> int:
    """How many of them are on this machine and share its processor."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def device(name: str) -> str:
    """The device of this process where ``name`` was asked for: a card each. UsageError for one card for all."""
    if count() == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise UsageError(f"each of several processes takes a card of its own, not all {name}: give --device cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def wait_for_the_first() -> None:
    """Before any but the first process says what is wrong: where it is wrong for all, torchrun ends this one meanwhile."""
    if not first():
        time.sleep(SAME)


def report(sentence: str) -> None:
    """Leave what is wrong where torchrun looks for it: the last lines of its own report, below a traceback of its own that cannot be had
    shorter, then say it too (torch.distributed.elastic: an error file for each process)."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if count() > 1 and file:
        told = {"message": {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(told), encoding="utf-8")


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """End this process although its main thread waits for a dead one: Python's own handlers run only when such a call returns.

    A second Ctrl-C, which torchrun sends on to processes that the terminal has sent it to already, is not heard.
    """
    if count() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    interrupt = signal.signal(signal.SIGINT, _interrupt_once)
    threading.Thread(target=_end_when_stuck, args=(ours,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, interrupt)
        theirs.close()


def _interrupt_once(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_when_stuck(heard: socket.socket) -> None:
    numbers = heard.recv(1)
    if not numbers:  # closed: the work is done
        return
    time.sleep(STUCK)
    if first():
        with suppress(OSError):
            print(f"error: {ENDED}", file=sys.stderr, flush=True)
    os._exit(128 + numbers[0])
