"""What a build depends on besides the source: the CPU's instruction sets, the machine's memory, and the compilers."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mbq_gguf.errors import UserError

CUDA_HOME = "/usr/local/cuda"  # the default of the toolkit's installer
BYTES_PER_JOB = 2 << 30  # the largest C++ files of llama.cpp, and nvcc, need between 1 and 2 GiB each


@cache
def cpu_flags() -> tuple[str, ...]:
    """This CPU's architecture and instruction sets from /proc/cpuinfo, sorted; its name if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return (platform.machine(), platform.processor())
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return (platform.machine(), *sorted(value.split()))
    return (platform.machine(),)


@cache
def machine_hash() -> str:
    """Short hash of `cpu_flags`: a build for other instruction sets must not run here."""
    return hashlib.sha256(" ".join(cpu_flags()).encode()).hexdigest()[:16]


def default_jobs() -> int:
    """Number of compilers to run at once: the CPUs available to this process, fewer if memory is short."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cpus, memory // BYTES_PER_JOB))


def find_tool(*names: str) -> Path | None:
    """The first of `names` found beside this Python (so a virtual environment need not be activated) or on PATH."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for name in names:
        found = shutil.which(name, path=search)
        if found:
            return Path(found)
    return None


@dataclass(frozen=True)
class Toolchain:
    """The programs needed for a build. ``ninja`` is None if CMake has to fall back to make, ``nvcc`` is None for a CPU build."""

    cmake: Path
    ninja: Path | None
    git: Path
    c_compiler: Path
    cxx_compiler: Path
    nvcc: Path | None

    def versions(self) -> list[str]:
        """The version of every compiler: a new compiler means a new build."""
        return [_version(path) for path in (self.c_compiler, self.cxx_compiler, self.nvcc) if path]


def find_toolchain(backend: str) -> Toolchain:
    """Find every program that a build needs, before anything is downloaded. Raises UserError if one is missing."""
    cmake, git = find_tool("cmake"), find_tool("git")
    c_found, cxx_compiler = c_compiler(), _compiler("CXX", "c++", "g++", "clang++")
    if cxx_compiler is None or c_found is None:
        raise UserError("no C and C++ compiler was found: install one, for example with `apt install g++`, or set CC and CXX")
    if not _shares_runtime(cxx_compiler):
        raise UserError(
            f"{cxx_compiler} has no shared C++ library, so programs that load several libraries, each with its own copy, crash: set "
            "CC and CXX to another compiler, for example CC=/usr/bin/gcc CXX=/usr/bin/g++"
        )
    if git is None:
        raise UserError("git was not found and is needed to apply the patch: install it, for example with `apt install git`")
    if cmake is None:
        raise UserError("cmake was not found: install it with `pip install 'mbq-gguf[build]'`")
    ninja = find_tool("ninja", "ninja-build")
    if ninja is None and find_tool("make") is None:
        raise UserError("neither ninja nor make was found: install ninja with `pip install 'mbq-gguf[build]'`")
    return Toolchain(cmake, ninja, git, c_found, cxx_compiler, _nvcc() if backend == "cuda" else None)


def _shares_runtime(compiler: Path) -> bool:
    """Whether libraries built with ``compiler`` can share one C++ library. Without it, std::regex was seen to crash in another copy's
    locale."""
    if sys.platform != "linux":
        return True
    asked = [[str(compiler), f"-print-file-name={name}"] for name in ("libstdc++.so", "libc++.so")]
    answers = [subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() for command in asked]
    return answers != ["libstdc++.so", "libc++.so"]  # a path if the file exists, else only the name


def gpu_architectures() -> str:
    """CMake's list of architectures for this machine's GPUs, for example ``90-real``. Raises UserError if no GPU is visible."""
    smi = find_tool("nvidia-smi")
    listed = ""
    if smi is not None:
        query: list[str | Path] = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = sorted({line.strip().replace(".", "") for line in listed.splitlines() if line.strip().replace(".", "").isdigit()})
    if not found:
        raise UserError("no NVIDIA GPU is visible: name the architectures to build for, for example with `--cuda-architectures 90`")
    return ";".join(f"{number}-real" for number in found)


def c_compiler() -> Path | None:
    """The C compiler, or None."""
    return _compiler("CC", "cc", "gcc", "clang")


def _compiler(variable: str, *names: str) -> Path | None:
    """The compiler in the environment variable, if set (its first word, as in ``ccache g++``, must exist), else one of ``names``."""
    wanted = os.environ.get(variable, "").split()
    return find_tool(wanted[0]) if wanted else find_tool(*names)


def _nvcc() -> Path:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX", ""), "nvcc", *(f"{home}/bin/nvcc" for home in [*homes, CUDA_HOME])]
    found = find_tool(*(name for name in candidates if name))
    if found is None:
        raise UserError("nvcc was not found: install the CUDA toolkit, set CUDA_HOME to it, or build with `--backend cpu`")
    return found


def _version(program: Path) -> str:
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return answer.splitlines()[-1 if "nvcc" in program.name else 0] if answer else str(program)
