"""``mbq-gguf`` in a process of its own that need not import torch and transformers again: forked from one that has, by multiprocessing's
fork server. A start costs 0.1 s of processor time instead of 7; exit codes, signals and output are those of the command,
variables those that the environment had at the first start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mbq_gguf.cli", "mbq_gguf.convert", "transformers.models.qwen2_vl.modeling_qwen2_vl"])


class Command:
    """``mbq-gguf ARGUMENTS``, started; what it prints goes to the file ``printed``."""

    def __init__(self, printed: Path, *arguments: object) -> None:
        self._process = _context.Process(target=_run, args=(printed, [str(argument) for argument in arguments]))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As Popen's: None while it runs, -9 after SIGKILL."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing where it has ended."""
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit code; it is killed where it takes longer."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(f"the command ran for more than {seconds} s")
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(printed: Path, arguments: list[str]) -> None:
    """What the forked process does: the command, with the signals' defaults as a shell leaves them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with printed.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    from mbq_gguf.cli import main

    sys.argv = ["mbq-gguf", *arguments]
    main()
