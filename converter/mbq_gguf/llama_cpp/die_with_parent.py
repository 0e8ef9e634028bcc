"""Runs a program that the kernel kills when its parent dies, even from kill -9. Executed by path; imports only the standard library.

This is a separate program because code that a multi-threaded parent runs between fork and exec may deadlock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """``die_with_parent.py PARENT PROGRAM ARGUMENT...``: become PROGRAM. PARENT is the process id of the caller."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
