"""The last message of a crashed process, as one short line that is the same for the same fault."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

FRAME = re.compile(r"^(?P<file>\S*lib(?:ggml|llama|mtmd)[^/]*)\((?P<symbol>[^+)]*)\+(?P<offset>0x[0-9a-f]+)\)", re.MULTILINE)
ASSERT = re.compile(r"^\S*?([^/\s]+):\d+: (GGML_ASSERT\(.*\) failed|.+)$", re.MULTILINE)
THROWN = re.compile(r"terminate called after throwing an instance of '(.+)'")
PASSED_OVER = re.compile(r"ggml_(abort|print_backtrace|uncaught_exception)|^\?\?")
DEPTH = 2  # frames that tell one fault from another


def compile_into(folder: Path) -> Path | None:
    """What :func:`install` loads, made once for all processes; None without a C compiler: they die silently then."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    out = folder / "stack.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(out), str(Path(__file__).with_name("stack.c"))]
    return out if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


def install(library: Path | None) -> None:
    """Let this process tell where it was when a signal ends it."""
    if library is not None:
        ctypes.CDLL(str(library)).install()


def signature(text: str, cause: str) -> str:
    """``cause`` (a signal's name), what was asserted or thrown, and the innermost functions of llama.cpp in ``text``."""
    said = ASSERT.findall(text)
    thrown = THROWN.search(text)
    names = [name for name in (_function(*found) for found in FRAME.findall(text)) if not PASSED_OVER.search(name)][:DEPTH]
    words = [f"{said[-1][0]}: {said[-1][1]}"] if said else [f"uncaught {thrown[1]}"] if thrown else []
    return " | ".join([cause, *words, " < ".join(names or ["??"])])


@lru_cache(maxsize=4096)
def _function(file: str, symbol: str, offset: str) -> str:
    """The function of a frame without its arguments."""
    resolver = shutil.which("addr2line")
    name = symbol
    if not symbol and resolver:
        found = subprocess.run([resolver, "-f", "-e", file, offset], capture_output=True, text=True, check=False).stdout
        name = found.split("\n", 1)[0]
    demangler = shutil.which("c++filt")
    if name.startswith("_Z") and demangler:
        name = subprocess.run([demangler, "-p", name], capture_output=True, text=True, check=False).stdout.strip()
    return name or "??"
