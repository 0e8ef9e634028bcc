"""Opens the built libraries once, checks them against their headers, and sends their log lines to :mod:`logging`."""

from __future__ import annotations

import logging
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mbq_cbind.declarations import declarations, layout, new_ffi
from mbq_cbind.errors import BindingError

BASE = ("ggml-base", "ggml-cpu")  # types and their kernels: nothing of a GPU
WHOLE = ("ggml", "llama", "mtmd")  # ggml brings every backend of the build along
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
OBJECT_HEADER = 32  # bytes of ggml_object (two sizes, a pointer, an enum), which ggml_tensor_overhead counts beside the tensor
LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # ggml_log_level; its INFO is chatter to us
KEPT_ERRORS = 4

log = logging.getLogger("mbq_cbind")
_last_errors: deque[str] = deque(maxlen=KEPT_ERRORS)
_build: Build | None = None


class Build(NamedTuple):
    """A built llama.cpp tree (libraries in ``tree/build/bin``), and the cache folder for declarations from its headers."""

    tree: Path
    cache: Path


def use(tree: Path, cache: Path) -> None:
    """Set the build to use. Libraries stay open until the process ends, so it cannot be changed after the first one was opened."""
    global _build
    _build = Build(tree, cache)


class Functions:
    """Every declared C function as an attribute, from whichever library has it."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __getattr__(self, name: str) -> Any:
        for handle in self.handles:
            try:
                function = getattr(handle, name)
            except AttributeError:
                continue
            setattr(self, name, function)
            return function
        raise BindingError(f"the built llama.cpp has no function {name}, so headers and libraries do not match: run `mbq-gguf build` again")


@dataclass(frozen=True)
class Binding:
    """The opened libraries: ``ffi`` creates and reads C data, ``c`` has the functions and enum constants."""

    ffi: Any
    c: Functions
    tree: Path
    log_callback: Any  # referenced here for as long as C may call it

    def text(self, pointer: Any) -> str:
        """A C string as str; "" for NULL."""
        return "" if pointer == self.ffi.NULL else self.ffi.string(pointer).decode("utf-8", errors="replace")


@cache
def load() -> Binding:
    """ggml's types and CPU kernels. Raises BindingError if no build was named, or headers and libraries disagree.

    No other library is opened: a CUDA backend in the process of torch's own CUDA libraries has made cuDNN crash.
    """
    if _build is None:
        raise BindingError("no llama.cpp was named: call mbq_cbind.library.use with a built tree first")
    declared = declarations(*_build)
    ffi = new_ffi(declared.cdef)
    check_layout(layout(ffi, declared.cdef), declared.layout)
    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, _: _log_line(level, ffi.string(text)))
    binding = Binding(ffi, Functions(_open(ffi, _build.tree, BASE)), _build.tree, callback)
    binding.c.ggml_log_set(callback, ffi.NULL)
    check_libraries(binding)
    binding.c.ggml_cpu_init()
    return binding


@cache
def load_whole() -> Binding:
    """:func:`load` with every backend of the build, libllama and libmtmd: whole models, and products on a named device."""
    base = load()
    binding = replace(base, c=Functions([*base.c.handles, *_open(base.ffi, base.tree, WHOLE)]))
    binding.c.llama_log_set(base.log_callback, base.ffi.NULL)
    binding.c.mtmd_helper_log_set(base.log_callback, base.ffi.NULL)
    check_whole(binding)
    binding.c.ggml_backend_load_all()
    binding.c.llama_backend_init()
    return binding


def check_layout(seen: dict[str, int], compiled: dict[str, int]) -> None:
    """Raise BindingError unless cffi's sizes, offsets and constants equal the C compiler's."""
    for key in seen.keys() | compiled.keys():
        if seen.get(key) != compiled.get(key):
            raise BindingError(
                f"{key} is {seen.get(key)} to the bindings and {compiled.get(key)} to the C compiler: "
                "remove the folder cbind in the cache of mbq-gguf and try again"
            )


def check_libraries(binding: Binding) -> None:
    """Raise BindingError if ggml's libraries were not built from these headers; compares its version and the size of a tensor."""
    ffi, c = binding.ffi, binding.c
    _agree(
        binding,
        _is_version(binding, c.ggml_version(), "ggml/CMakeLists.txt", "GGML")
        and c.ggml_tensor_overhead() == ffi.sizeof("struct ggml_tensor") + OBJECT_HEADER,
    )


def check_whole(binding: Binding) -> None:
    """Raise BindingError if libllama and libmtmd were not built from these headers; compares the version and default parameters."""
    c = binding.c
    model, media = c.llama_context_default_params(), c.mtmd_context_params_default()
    _agree(
        binding,
        _is_version(binding, c.llama_version(), "CMakeLists.txt", "LLAMA")
        and (model.type_k, model.type_v) == (c.GGML_TYPE_F16, c.GGML_TYPE_F16)
        and media.media_marker == c.mtmd_default_marker(),
    )


def take_error(default: str) -> str:
    """Return and clear the last error lines that C logged, joined; ``default`` if there are none."""
    lines = list(_last_errors)
    _last_errors.clear()
    return "; ".join(lines) or default


def _log_line(level: int, text: bytes) -> None:
    line = " ".join(text.decode("utf-8", errors="replace").split())  # some say two lines at once; an error of ours is one sentence
    if not line:
        return
    if LEVELS.get(level) == logging.ERROR:
        _last_errors.append(line)
    # An error becomes a BindingError if it matters, so that the user reads one sentence and not two.
    log.log(min(LEVELS.get(level, logging.DEBUG), logging.INFO), "%s", line)


def _open(ffi: Any, tree: Path, names: Sequence[str]) -> list[Any]:
    """Open the libraries, each of which needs only those before it, without exposing their symbols to others."""
    handles = []
    for name in names:
        path = tree / "build" / "bin" / f"lib{name}{SUFFIX}"
        try:
            handles.append(ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL))
        except OSError as error:
            raise BindingError(f"{path} cannot be opened ({error}): run `mbq-gguf build` again") from error
    return handles


def _agree(binding: Binding, agree: bool) -> None:
    if not agree:
        raise BindingError(f"the libraries in {binding.tree / 'build' / 'bin'} were not built from that tree's headers: build it again")


def _is_version(binding: Binding, reported: Any, file: str, project: str) -> bool:
    """Whether the version that a library reports starts with the one that ``file`` sets for ``project``."""
    path = binding.tree / file
    try:
        parts = dict(re.findall(rf"set\({project}_VERSION_(MAJOR|MINOR|PATCH)\s+(\d+)\)", path.read_text(encoding="utf-8")))
        return binding.text(reported).startswith(".".join(parts[part] for part in ("MAJOR", "MINOR", "PATCH")))
    except (OSError, KeyError) as error:
        raise BindingError(f"{path} does not say which version of {project.lower()} it is: use the pinned llama.cpp") from error
