"""Writes files atomically: they get their final name when complete, and only one run at a time writes them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mbq_gguf.errors import UsageError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, or file size limit
PART = ".part"
GGUF = b"GGUF"  # the first bytes of a GGUF file


def check_output(path: Path) -> None:
    """Raise UsageError if ``path`` cannot be written; cheaper to check now than after the work."""
    final = target(path)
    folder = final.parent
    if final.is_dir():
        raise UsageError(f"{path} is a folder: give the name of the GGUF file to write")
    if final.exists() and not final.is_file():
        raise UsageError(f"{path} is a device or a pipe: give the name of a file")
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist: create it, or choose another place for {path.name}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write in {folder} ({reason(error)}): choose another place for {path.name}") from error


def check_gguf_output(path: Path) -> None:
    """The same for a GGUF file. It may only replace a GGUF file or an empty one, so that swapped arguments cannot overwrite a model's
    config.json."""
    check_output(path)
    try:
        with path.open("rb") as file:
            begins = file.read(len(GGUF))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} exists and cannot be read ({reason(error)}): move it away, or choose another name") from error
    if begins not in (b"", GGUF):
        raise UsageError(f"{path} exists and is not a GGUF file: move it away, or choose another name")


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are needed: free some space there, or choose another place"
        )


@contextmanager
def claimed(*finals: Path) -> Iterator[None]:
    """Lock ``finals`` against other runs for the block, and remove temporary files that killed runs left beside them.

    Raises UsageError if another run holds one of them.
    """
    with ExitStack() as held:
        for final in finals:
            held.enter_context(_claim(final))
        for final in finals:
            for left in target(final).parent.glob(f"{hidden(final)}-*{PART}"):
                left.unlink(missing_ok=True)
        yield


@contextmanager
def _claim(final: Path) -> Iterator[None]:
    """Hold a lock file beside ``final``. The kernel releases the lock however this process ends; the file is removed with the lock."""
    path = target(final).parent / f"{hidden(final)}.lock"
    descriptor = _opened(path, final)
    while not _locked(descriptor, path, final):
        os.close(descriptor)
        descriptor = _opened(path, final)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _opened(path: Path, final: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write in {path.parent} ({reason(error)}): choose another place for {final.name}") from error


def _locked(descriptor: int, path: Path, final: Path) -> bool:
    """Lock ``descriptor``; False if ``path`` is a different file by now, because the previous holder has removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"another mbq-gguf is writing {final}: wait until it has ended, or choose another name") from None
    except OSError:
        return True  # no locks on this file system; temporary names are unique, so the run that ends last leaves complete files
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def staged(*finals: Path) -> Iterator[list[Path]]:
    """Temporary files beside ``finals``; all are renamed to ``finals`` if the block succeeds, and removed if it fails.

    If one of ``finals`` is a symlink, the file that it points to is replaced. Raises UserError if the disk is full or the files cannot be
    written.
    """
    with ExitStack() as undo:
        try:
            parts = [undo.enter_context(new_file(target(final).parent, f"{hidden(final)}-", PART)) for final in finals]
            yield parts
            for part in parts:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                    if not os.fstat(file.fileno()).st_size:
                        raise OSError(errno.ENODATA, "nothing was written")
            for part, final in zip(parts, finals, strict=True):
                os.replace(part, target(final))
        except OSError as error:
            names = " and ".join(str(final) for final in finals)
            if error.errno in FULL:
                raise UserError(f"the disk is full: free some space beside {finals[0]}, or choose another place, and run again") from error
            raise UserError(f"cannot write {names} ({reason(error)}): check the path, its permissions and the disk") from error


@contextmanager
def new_file(folder: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """An empty file with an unpredictable name in ``folder``; removed at the end if it still has that name.

    It is created exclusively, so that a planted symlink is never followed, and with the usual permissions of new files.
    """
    path = folder / f"{prefix}{secrets.token_hex(8)}{suffix}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def target(path: Path) -> Path:
    """The absolute path of the file that ``path`` means, through links."""
    return Path(os.path.realpath(path))


def hidden(final: Path) -> str:
    """How the names of what lies beside ``final`` while it is made begin.

    A digest, since the conversion package reads braces in file names as templates.
    """
    return f".mbq-gguf-{hashlib.sha256(os.fsencode(target(final).name)).hexdigest()[:12]}"


def reason(error: OSError) -> str:
    """What the system says about ``error``, in lower case."""
    return (error.strerror or str(error)).lower()
