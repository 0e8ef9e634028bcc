"""Files that appear under their final name only when they are whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbq_gguf.errors import UsageError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or the largest file allowed


def check_output(path: Path) -> None:
    """Raise UsageError where no file can be made under ``path``: cheaper now than after the work."""
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the GGUF file to write in it")
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist: create it, or choose another place for {path.name}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write in {folder} ({reason(error)}): choose another place for {path.name}") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are needed: free some space there, or choose another place"
        )


@contextmanager
def staged(*finals: Path) -> Iterator[list[Path]]:
    """Temporary names beside ``finals``; all are renamed together when the block ends well and removed when it does not.

    Raises UserError where the disk is full or the files cannot be written.
    """
    parts = [part_of(final) for final in finals]
    try:
        yield parts
        for part in parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        for part, final in zip(parts, finals, strict=True):
            os.replace(part, final)
    except OSError as error:
        names = " and ".join(str(final) for final in finals)
        if error.errno in FULL:
            raise UserError(f"the disk is full: free some space beside {finals[0]}, or choose another place, and run again") from error
        raise UserError(f"cannot write {names} ({reason(error)}): check the path, its rights and the disk") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def part_of(final: Path) -> Path:
    """The temporary name beside ``final``: the same in every run, so that the next one clears away what a killed one left.

    A digest, since the conversion package reads braces in file names as templates.
    """
    return final.absolute().parent / f".mbq-gguf-{hashlib.sha256(final.name.encode()).hexdigest()[:12]}.part"


def reason(error: OSError) -> str:
    """What the system says about ``error``, in lower case."""
    return (error.strerror or str(error)).lower()
