"""Run a program that the kernel ends when its parent dies, also by kill -9. Run by its path; imports the standard library alone.

A file of its own, executed between fork and exec: what a parent with threads runs in its forked child before exec may hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """``die_with_parent.py PARENT PROGRAM ARGUMENT...``: become PROGRAM, with the number of the process that started it in PARENT."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
