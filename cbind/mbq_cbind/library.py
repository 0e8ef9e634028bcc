"""Opens the built libraries once, checks them against their headers, and sends their log lines to :mod:`logging`."""

from __future__ import annotations

import logging
import re
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.paths import find_library, source_dir

from mbq_cbind.declarations import declarations, layout, new_ffi

LIBRARIES = ("ggml-base", "ggml-cpu", "ggml", "llama", "mtmd")  # each needs only those before it
OBJECT_HEADER = 32  # bytes of ggml_object (two sizes, a pointer, an enum), which ggml_tensor_overhead counts beside the tensor
LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # ggml_log_level; its INFO is chatter to us
KEPT_ERRORS = 4

log = logging.getLogger("mbq_cbind")
_last_errors: deque[str] = deque(maxlen=KEPT_ERRORS)


class Functions:
    """Every declared C function as an attribute, whichever library holds it."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __getattr__(self, name: str) -> Any:
        for handle in self._handles:
            try:
                function = getattr(handle, name)
            except AttributeError:
                continue
            setattr(self, name, function)
            return function
        raise UserError(f"the built llama.cpp has no function {name}, so headers and libraries do not match: run `mbq-gguf build` again")


@dataclass(frozen=True)
class Binding:
    """The opened libraries: ``ffi`` makes and reads C data, ``c`` holds the functions and enum constants."""

    ffi: Any
    c: Functions
    tree: Path
    log_callback: Any  # referenced here for as long as C may call it

    def text(self, pointer: Any) -> str:
        """A C string as str; "" for NULL."""
        return "" if pointer == self.ffi.NULL else self.ffi.string(pointer).decode("utf-8", errors="replace")

    def versions(self) -> dict[str, str]:
        """Versions that the libraries report, by "ggml" and "llama"."""
        return {"ggml": self.text(self.c.ggml_version()), "llama": self.text(self.c.llama_version())}


@cache
def load() -> Binding:
    """The libraries of the build in use. Raises UserError where none is built, or headers and libraries disagree."""
    tree = source_dir()
    declared = declarations(tree)
    ffi = new_ffi(declared.cdef)
    check_layout(layout(ffi, declared.cdef), declared.layout)
    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, _: _log_line(level, ffi.string(text)))
    binding = Binding(ffi, Functions([_open(ffi, name) for name in LIBRARIES]), tree, callback)
    binding.c.llama_log_set(callback, ffi.NULL)
    binding.c.mtmd_helper_log_set(callback, ffi.NULL)
    check_libraries(binding)
    binding.c.ggml_cpu_init()
    binding.c.ggml_backend_load_all()
    binding.c.llama_backend_init()
    return binding


def check_layout(seen: dict[str, int], compiled: dict[str, int]) -> None:
    """Raises UserError unless cffi's sizes, offsets and constants are the C compiler's."""
    for key in seen.keys() | compiled.keys():
        if seen.get(key) != compiled.get(key):
            raise UserError(
                f"{key} is {seen.get(key)} to the bindings and {compiled.get(key)} to the C compiler: "
                "remove the folder cbind in the cache of mbq-gguf and try again"
            )


def check_libraries(binding: Binding) -> None:
    """Raises UserError where the libraries were not made from these headers: versions, tensor size, and default parameters as probes."""
    ffi, c = binding.ffi, binding.c
    model, media = c.llama_context_default_params(), c.mtmd_context_params_default()
    agree = (
        binding.versions()["ggml"].startswith(_cmake_version(binding.tree / "ggml" / "CMakeLists.txt", "GGML"))
        and binding.versions()["llama"].startswith(_cmake_version(binding.tree / "CMakeLists.txt", "LLAMA"))
        and c.ggml_tensor_overhead() == ffi.sizeof("struct ggml_tensor") + OBJECT_HEADER
        and (model.type_k, model.type_v) == (c.GGML_TYPE_F16, c.GGML_TYPE_F16)
        and media.media_marker == c.mtmd_default_marker()
    )
    if not agree:
        raise UserError(f"the libraries in {binding.tree / 'build' / 'bin'} were not built from that tree's headers: build it again")


def take_error(default: str) -> str:
    """The last error lines that C logged, joined, and forgotten; ``default`` where there are none."""
    lines = list(_last_errors)
    _last_errors.clear()
    return "; ".join(lines) or default


def _log_line(level: int, text: bytes) -> None:
    line = text.decode("utf-8", errors="replace").strip()
    if not line:
        return
    if LEVELS.get(level) == logging.ERROR:
        _last_errors.append(line)
    # An error becomes a UserError where it matters, so that the user reads one sentence and not two.
    log.log(min(LEVELS.get(level, logging.DEBUG), logging.INFO), "%s", line)


def _open(ffi: Any, name: str) -> Any:
    path = find_library(name)
    try:
        return ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error}): run `mbq-gguf build` again") from error


def _cmake_version(path: Path, project: str) -> str:
    try:
        parts = dict(re.findall(rf"set\({project}_VERSION_(MAJOR|MINOR|PATCH)\s+(\d+)\)", path.read_text()))
        return ".".join(parts[part] for part in ("MAJOR", "MINOR", "PATCH"))
    except (OSError, KeyError) as error:
        raise UserError(f"{path} does not say which version of {project.lower()} it is: use the pinned llama.cpp") from error
