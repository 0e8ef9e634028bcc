"""Finds the built llama.cpp: programs, libraries, and the patched source tree.

``MBQ_GGUF_LLAMA_CPP=<tree>`` (a built tree, ``<tree>/build/bin``) has priority; otherwise the most recently requested finished build in the
cache with the current pin and patch, for the backend ``MBQ_GGUF_BACKEND`` (``cpu`` where unset).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp.cache import finished_builds
from mbq_gguf.llama_cpp.machine import machine_hash
from mbq_gguf.llama_cpp.pin import patch_hash, read_pin

BACKENDS = ("cpu", "cuda")
LIBRARY_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def chosen_backend() -> str:
    """The backend of ``MBQ_GGUF_BACKEND``, ``cpu`` where unset. Raises UsageError for any other word."""
    backend = os.environ.get("MBQ_GGUF_BACKEND") or "cpu"
    if backend not in BACKENDS:
        raise UsageError(f"MBQ_GGUF_BACKEND is {backend!r}: set it to one of {', '.join(BACKENDS)}")
    return backend


def check_gpu_layers(count: int) -> None:
    """Raise UsageError if ``count`` layers shall be on a GPU (0: none) and mbq-gguf's build for the CPU is in use, which has no use for
    the number: everything would run on the CPU, unnoticed."""
    if count and not os.environ.get("MBQ_GGUF_LLAMA_CPP") and chosen_backend() == "cpu":
        raise UsageError("--gpu-layers needs a build for a GPU: run `mbq-gguf build --backend cuda` once, and set MBQ_GGUF_BACKEND=cuda")


def source_dir() -> Path:
    """The patched source tree of the build in use, with conversion/, gguf-py/, ggml/include, include/ and tools/mtmd.

    Raises UserError if nothing is built, UsageError if ``MBQ_GGUF_LLAMA_CPP`` names a folder that holds no build.
    """
    override = os.environ.get("MBQ_GGUF_LLAMA_CPP")
    if override:
        tree = Path(override).expanduser().absolute()
        if not (tree / "build" / "bin").is_dir():
            raise UsageError(f"MBQ_GGUF_LLAMA_CPP is {tree}, which has no build/bin: build llama.cpp there, or unset the variable")
        return tree
    backend = chosen_backend()
    here = machine_hash()
    builds = [(tree, record) for tree, record in finished_builds() if record.backend == backend and record.machine == here]
    patch, pin = patch_hash(backend=backend), read_pin().sha256
    for tree, record in builds:
        # A build from --source has a path as its origin; it is valid as long as its patch is the current one.
        if record.patch_hash == patch and (record.origin == pin or os.sep in record.origin):
            return tree
    command = "mbq-gguf build" if backend == "cpu" else f"mbq-gguf build --backend {backend}"
    if builds:
        raise UserError(f"the patch has changed since llama.cpp was built for {backend}: run `{command}` first")
    raise UserError(f"llama.cpp is not built yet for {backend}: run `{command}` first")


def find_program(name: str) -> Path:
    """The built program `name`, for example ``llama-server``. Raises UserError if it was not built."""
    return _in_bin(name, f"program {name}")


def find_library(name: str) -> Path:
    """The built library `name`, ``llama`` or ``libllama.so``. Raises UserError if it was not built."""
    base = name.removeprefix("lib").removesuffix(LIBRARY_SUFFIX)
    return _in_bin(f"lib{base}{LIBRARY_SUFFIX}", f"library {base}")


def find(name: str) -> Path:
    """The path that ``mbq-gguf path NAME`` prints: ``source``, a library (``libllama.so``) or a program (``llama-server``)."""
    if name == "source":
        return source_dir()
    if name.endswith(LIBRARY_SUFFIX) or name.startswith("lib"):
        return find_library(name)
    return find_program(name)


def _in_bin(file_name: str, what: str) -> Path:
    folder = source_dir() / "build" / "bin"
    path = folder / file_name
    if path.is_file():
        return path
    raise UserError(f"the {what} is not in the build in {folder}: check the name, or run `mbq-gguf build` first")
