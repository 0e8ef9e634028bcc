"""Processes of a test that own a llama-server, or are one. They end with the test, and with pytest even if that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbq_gguf.llama_cpp import die_with_parent

# Starts a server for the model that it is given, tells the server's process number, and waits to be ended.
HOLD = """
import sys, threading, time
from pathlib import Path
from mbq_gguf.llama_cpp.server import LlamaServer
def hold():
    with LlamaServer(Path(sys.argv[1]), None, threads=1) as server:
        print(server.pid, flush=True)
        time.sleep(600)
"""
HOLDER = HOLD + "hold()"
THREAD_HOLDER = HOLD + "thread = threading.Thread(target=hold)\nthread.start()\nthread.join()"


@contextmanager
def started(*command: object, **options: Any) -> Iterator[Any]:
    """``command``, killed at the end of the block if it still runs; ``options`` are Popen's."""
    owned = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), *map(str, command)]
    with subprocess.Popen(owned, **{"stdout": subprocess.PIPE, "text": True} | options) as process:
        try:
            yield process
        finally:
            process.kill()


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but is not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
