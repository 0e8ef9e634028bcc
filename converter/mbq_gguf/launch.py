"""Rank and count of the processes that torchrun started to convert one model together. Imports nothing heavy."""

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

SAME = 15.0  # seconds that other processes wait for the first to report an error, since most errors occur in all
STUCK = 20.0  # seconds that a signalled process has to end by itself; it cannot if it waits for a dead one in a collective
ENDED = (
    "another process of this run has ended, or all were told to end: no partial files are left, and the same command, with any number of "
    "processes, resumes from the last finished layer"
)


def count() -> int:
    """The number of processes that work together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The rank of this process. Only rank 0, the first, writes files and messages."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def first() -> bool:
    """Whether this is the first process, or the only one."""
    return rank() == 0


def neighbours() -> int:
    """The number of processes on this machine, which share its CPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def device(name: str) -> str:
    """The device of this process if ``name`` was requested: one GPU each. Raises UsageError for one GPU for all."""
    if count() == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise UsageError(f"several processes cannot share {name}, each uses its own GPU: give --device cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def wait_for_the_first() -> None:
    """Give the first process time to report an error; if it occurs in all processes, torchrun ends this one meanwhile."""
    if not first():
        time.sleep(SAME)


def report(sentence: str) -> None:
    """Write ``sentence`` to torchrun's error file (torch.distributed.elastic has one for each process).

    torchrun then repeats it in the last lines of its report, below a traceback of its own that cannot be suppressed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if count() > 1 and file:
        content = {"message": {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Let signals end this process even while its main thread waits in a collective for a dead one, which blocks Python's handlers.

    Ignores a second Ctrl-C: torchrun forwards the one that the terminal has already sent.
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
    if not numbers:  # closed: the block has ended
        return
    time.sleep(STUCK)
    if first():
        with suppress(OSError):
            print(f"error: {ENDED}", file=sys.stderr, flush=True)
    os._exit(128 + numbers[0])
