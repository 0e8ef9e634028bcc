"""A hash of the code that determines a file's bytes, so that results of older code are not reused."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# Imported, but no byte of a file depends on it: how llama.cpp is built (its pin is hashed separately).
WITHOUT = ("llama_cpp",)


@cache
def code_hash(module: str) -> str:
    """SHA-256 over the sources of ``module`` ("quantise", "export.gguf_writer"), of the modules of this package that it imports, and of C
    files of the same names."""
    found: set[Path] = set()
    _collect(_file(module), found)
    digest = hashlib.sha256()
    for file in sorted(found | {source for file in found if (source := file.with_suffix(".c")).is_file()}):
        digest.update(f"{file.relative_to(PACKAGE)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _collect(file: Path, found: set[Path]) -> None:
    if file in found or file.relative_to(PACKAGE).parts[0] in WITHOUT:
        return
    found.add(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            name = (node.module or "").partition(".")[2]
            for part in (name, *(f"{name}.{alias.name}".lstrip(".") for alias in node.names)):
                if part and (wanted := _file(part)).is_file():
                    _collect(wanted, found)


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
