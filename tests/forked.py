"""Runs ``mbq-gguf`` in a process that need not import torch and transformers again: multiprocessing's fork server forks it from one that
has. A start costs 0.1 s of processor time instead of 7. Exit codes, signals and output are those of the command; environment variables are
those of the first start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mbq_gguf.cli", "mbq_gguf.convert", "transformers.models.qwen2_vl.modeling_qwen2_vl"])


class Command:
    """``mbq-gguf ARGUMENTS``, started; what it prints goes to the file ``printed``.

    ``variables`` are added to its environment; ``work``, a function of a module, is called with the arguments instead of the command.
    """

    def __init__(
        self,
        printed: Path,
        *arguments: object,
        variables: dict[str, str] | None = None,
        work: Callable[..., object] | None = None,
    ) -> None:
        given = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(printed, given, variables or {}, work or command))
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


def command(*arguments: str) -> None:
    """``mbq-gguf ARGUMENTS``."""
    from mbq_gguf.cli import main

    sys.argv = ["mbq-gguf", *arguments]
    main()


def of_several(count: int, port: int) -> list[dict[str, str]]:
    """The variables with which torchrun starts so many processes of one run; they meet at ``port``."""
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    each = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def _run(printed: Path, arguments: list[str], variables: dict[str, str], work: Callable[..., object]) -> None:
    """What the forked process does, with the signals' defaults as a shell leaves them."""
    os.environ.update(variables)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with printed.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    work(*arguments)
