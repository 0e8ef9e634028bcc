"""The pin: the llama.cpp source that the patch is for, and a hash of the patch."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from mbq_gguf.errors import UserError


@dataclass(frozen=True)
class Pin:
    """A source package on PyPI, and the folder in it that contains llama.cpp."""

    package: str
    version: str
    sha256: str  # of the source package, lower-case hex
    subdirectory: str


@cache
def patch_dir() -> Path:
    """The folder ggml_patch: package data in a wheel, next to ``converter/`` in an editable install.

    Raises UserError if neither holds a PIN file.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "ggml_patch", package.parents[1] / "ggml_patch"):
        if (candidate / "PIN").is_file():
            return candidate
    raise UserError("the folder ggml_patch with its PIN file is missing from this installation: install mbq-gguf again")


def read_pin(folder: Path | None = None) -> Pin:
    """Parse ``<folder>/PIN``: lines ``key = value``, ``#`` starts a comment. Raises UserError if a key is missing or odd."""
    path = (folder or patch_dir()) / "PIN"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the pin {path} ({error.strerror}): restore the file from the repository") from error
    values: dict[str, str] = {}
    for line in lines:
        key, separator, value = line.split("#", 1)[0].partition("=")
        if separator:
            values[key.strip()] = value.strip()
    names = [field.name for field in fields(Pin)]
    missing = [name for name in names if not values.get(name)]
    if missing:
        raise UserError(f"{path} lacks the line `{missing[0]} = ...`: restore the file from the repository")
    if not re.fullmatch(r"[0-9a-f]{64}", values["sha256"]):
        raise UserError(f"the sha256 in {path} is not 64 lower-case hexadecimal digits: restore the file from the repository")
    return Pin(**{name: values[name] for name in names})


def patch_files(folder: Path | None = None) -> list[Path]:
    """``patches/*.patch`` in order of application, by name."""
    return sorted(((folder or patch_dir()) / "patches").glob("*.patch"))


def source_files(folder: Path | None = None) -> list[Path]:
    """All files below ``src/``, in a fixed order, without __pycache__."""
    found = ((folder or patch_dir()) / "src").rglob("*")
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def patch_hash(folder: Path | None = None, backend: str = "cuda") -> str:
    """SHA-256 over names and contents of the patches and new files that ``backend`` compiles.

    The CPU build does not compile CUDA files, so changes to CUDA kernels do not cause a CPU rebuild of eight minutes.
    """
    root = folder or patch_dir()
    digest = hashlib.sha256()
    for path in [*patch_files(root), *source_files(root)]:
        if backend == "cpu" and (path.name.endswith("-cuda.patch") or "ggml-cuda" in path.parts):
            continue
        name, data = path.relative_to(root).as_posix().encode(), path.read_bytes()
        digest.update(b"%d:%s%d:" % (len(name), name, len(data)))
        digest.update(data)
    return digest.hexdigest()
