"""A hash of the code that determines a file's bytes, so that results of older code are not reused."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# Imported, but no byte of a file depends on it: how llama.cpp is built (its pin is hashed separately).
WITHOUT = ("llama_cpp",)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def code_hash(module: str) -> str:
    """SHA-256 over what runs of ``module`` ("quantise", "export.gguf_writer"), of the modules of this package that it imports, and of C
    files of the same names.

    Of Python that is the syntax tree without docstrings: comments, docstrings and layout do not count. C files count as they are. Python
    3.11 and 3.12 write the same tree differently, so the hash changes with the version of Python (not with its bug fixes)."""
    found: dict[Path, bytes] = {}
    _collect(_file(module), found)
    found |= {source: source.read_bytes() for file in found if (source := file.with_suffix(".c")).is_file()}
    digest = hashlib.sha256()
    for file, running in sorted(found.items()):
        digest.update(f"{file.relative_to(PACKAGE)} {hashlib.sha256(running).hexdigest()}".encode())
    return digest.hexdigest()


def _collect(file: Path, found: dict[Path, bytes]) -> None:
    """Add to ``found`` what runs of ``file`` and of what it imports: the syntax tree without docstrings, as text."""
    if file in found or file.relative_to(PACKAGE).parts[0] in WITHOUT:
        return
    found[file] = b""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            name = (node.module or "").partition(".")[2]
            for part in (name, *(f"{name}.{alias.name}".lstrip(".") for alias in node.names)):
                if part and (wanted := _file(part)).is_file():
                    _collect(wanted, found)
    found[file] = ast.dump(tree).encode()


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
