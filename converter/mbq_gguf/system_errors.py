"""Errors of the operating system that may occur wherever a command writes, as sentences for the user."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.atomic import FULL
from mbq_gguf.llama_cpp.cache import cache_root

NEARLY_FULL = 1 << 20  # bytes
NO_TEMPORARY = "No usable temporary directory"  # tempfile's words if it cannot write a few bytes in any


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise UserError or UsageError for a full disk, a path that is too long, and if there is no place for temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # pathlib's is_file() raises this one, for any path of the command
            raise UsageError("a path is longer than the file system allows: shorten it") from error
        if error.errno in FULL:
            raise UserError(
                f"no space is left {_place(error)}: free some, or choose another disk (TMPDIR is the folder for temporary files, "
                "MBQ_GGUF_CACHE the cache), and run the same command again"
            ) from error
        if NO_TEMPORARY in str(error):
            raise UserError(
                "no temporary file can be written, neither in TMPDIR nor in /tmp, /var/tmp and this folder: free some space, "
                "or set TMPDIR to another folder"
            ) from error
        raise


def _place(error: OSError) -> str:
    """Where ``error`` has found no space, as far as it is known: a failed write, unlike a failed copy, does not say."""
    file = error.filename2 or error.filename  # source and target of a copy, or one file
    if isinstance(file, str | Path):
        return f"for {file}"
    folders = [cache_root()]
    with suppress(FileNotFoundError):  # no folder has room for temporary files
        folders.insert(0, Path(tempfile.gettempdir()))
    full = [str(folder) for folder in folders if folder.is_dir() and shutil.disk_usage(folder).free < NEARLY_FULL]
    return f"in {' and '.join(full)}" if full else "on a disk that this command writes to"
