"""Downloads, patches, builds and verifies llama.cpp; finished builds are cached under a hash of everything that affects them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp import page as pages
from mbq_gguf.llama_cpp import pin as pins
from mbq_gguf.llama_cpp import source, verify
from mbq_gguf.llama_cpp.cache import MARKER, BuildRecord, cache_root, read_record, write_record
from mbq_gguf.llama_cpp.locks import file_lock, termination_as_exit
from mbq_gguf.llama_cpp.machine import Toolchain, cpu_flags, default_jobs, find_tool, find_toolchain, gpu_architectures, machine_hash
from mbq_gguf.llama_cpp.patch import apply_patch
from mbq_gguf.llama_cpp.paths import BACKENDS
from mbq_gguf.llama_cpp.steps import BuildProgress, disk_full, run_step, say

PROGRAMS = (
    "llama-server",
    "llama-mtmd-cli",
    "llama-bench",
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "ggml-rpc-server",
    "test-backend-ops",
    "test-quantize-fns",
)
KERNELS = "ggml-cpu"  # the only library that depends on the instruction sets: built and verified first
FINAL_CHECK = "test-quantize-fns"  # links all libraries and checks all types in a second or two

_COMMON: tuple[str, ...] = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=ON",
    "CMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "LLAMA_BUILD_TOOLS=ON",
    "LLAMA_BUILD_SERVER=ON",
    "LLAMA_BUILD_TESTS=ON",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_UI=OFF",  # the web page is built separately and copied into the tree
    "LLAMA_USE_PREBUILT_UI=OFF",  # would download it while building
    "LLAMA_OPENSSL=OFF",
    "GGML_RPC=ON",
    "GGML_RPC_RDMA=OFF",  # would depend on libibverbs being installed
    "LLAMA_ALL_WARNINGS=OFF",  # GCC 12 writes 35000 lines of them for the AMX kernels alone
)
_CUDA = ("GGML_CUDA=ON", "GGML_CUDA_NCCL=OFF", "GGML_CUDA_FA_QUANTS=f16-f16", "GGML_CUDA_COMPRESSION_MODE=none")
_FLAG_VARIABLES = ("CC", "CXX", "CUDACXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")  # environment variables that CMake uses


@dataclass(frozen=True)
class Plan:
    """Everything that determines a build and its place."""

    backend: str
    origin: Path | None  # the tree of --source; None for the pinned package
    pin: pins.Pin
    toolchain: Toolchain
    patch: str  # hash of the patch
    options: tuple[str, ...]
    key: str
    page: Path | None = None  # the finished web page; None: a server without one

    def with_page(self, page: Path | None) -> Plan:
        """This plan with the web page in `page`, which gives it another key."""
        if page is None:
            return self
        return replace(self, page=page, key=hashlib.sha256(f"{self.key} {page.name}".encode()).hexdigest()[:16])

    @property
    def name(self) -> str:
        """The name of the build's folder: ``cpu-a503bcd10113ce6a``."""
        return f"{self.backend}-{self.key}"

    @property
    def tree(self) -> Path:
        """The path of the patched tree in the cache, built or not."""
        return cache_root() / "builds" / self.name


def build(
    backend: str = "cpu",
    source: Path | None = None,
    jobs: int | None = None,
    cuda_architectures: str | None = None,
    page: str = "auto",
    console: Console | None = None,
) -> Path:
    """Build the patched llama.cpp unless the same build is already in the cache.

    `source`: a llama.cpp tree to use instead of the pinned package (copied, never edited). `jobs`: parallel compilers, by default as many
    as CPUs and memory allow. `cuda_architectures`: CMake's list, for example ``90``; by default those of the visible GPUs. `page`:
    llama-server's web page, ``on``, ``off``, or ``auto`` (if npm can build it). Returns the patched tree, with programs and libraries in
    ``build/bin``. Raises UserError; no partial build is then left.
    """
    console = console or Console(stderr=True)
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}: it must be at least 1")
    try:
        with termination_as_exit(), ExitStack() as locked:
            plan = make_plan(backend, source, cuda_architectures)
            plan = plan.with_page(pages.find_page(page, plan.origin, plan.pin, console))
            locked.enter_context(_locked(plan.name, console))
            if read_record(plan.tree):
                (plan.tree / MARKER).touch()  # the most recently requested build is the one in use
                say(console, f"llama.cpp for {backend} is built already: {plan.tree}")
            else:
                _build_whole(plan, jobs or default_jobs(), console)
            return plan.tree
    except OSError as error:
        root = cache_root()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(root) from error
        raise UserError(f"cannot write the build in {root} ({error.strerror or error}): set MBQ_GGUF_CACHE to another folder") from error


def make_plan(backend: str, tree: Path | None, cuda_architectures: str | None) -> Plan:
    """Check the build's requirements and compute its key, before downloading anything."""
    if backend not in BACKENDS:
        raise UsageError(f"the backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    pin, toolchain = pins.read_pin(), find_toolchain(backend)
    origin = source.check_source(tree) if tree is not None else None
    patch = pins.patch_hash(backend=backend)
    options = (*_COMMON, f"LLAMA_BUILD_COMMIT=mbq-{patch[:8]}")  # shown by `llama-server --version`
    if backend == "cuda":
        options += (*_CUDA, f"CMAKE_CUDA_ARCHITECTURES={cuda_architectures or gpu_architectures()}")
    parts = [
        f"{pin.sha256} {pin.subdirectory}" if origin is None else source.tree_hash(origin),
        patch,
        *options,
        *(f"{wanted.name} {wanted.definitions}" for wanted in verify.instruction_sets()),
        *PROGRAMS,
        *toolchain.versions(),
        *(f"{name}={os.environ[name]}" for name in _FLAG_VARIABLES if name in os.environ),
        *cpu_flags(),
    ]
    return Plan(backend, origin, pin, toolchain, patch, options, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])


def _build_whole(plan: Plan, jobs: int, console: Console) -> None:
    """Build in the final place, so that file names in messages stay valid. Without the marker, written last, the tree is not used."""
    log_path = cache_root() / "logs" / f"{plan.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(plan.name)
    try:
        plan.tree.mkdir(parents=True)
        if plan.origin is None:
            source.unpack(source.fetch(plan.pin, console), plan.pin, plan.tree)
        else:
            source.copy_tree(plan.origin, plan.tree)
        apply_patch(plan.tree, plan.toolchain.git)
        if pins.patch_hash(backend=plan.backend) != plan.patch:
            raise UserError("the patch was edited while it was applied: build again")
        if plan.page is not None:
            shutil.copytree(plan.page, plan.tree / pages.RESULT)
        with log_path.open("w", encoding="utf-8") as log:
            verified = _compile(plan, jobs, log, console)
        _check_result(plan.backend, plan.tree / "build" / "bin")
        origin = plan.pin.sha256 if plan.origin is None else str(plan.origin)
        record = BuildRecord(plan.key, plan.backend, plan.patch, origin, machine_hash(), verified.name, plan.options)
        write_record(plan.tree, record)
    except BaseException:
        shutil.rmtree(plan.tree, ignore_errors=True)
        raise


def _compile(plan: Plan, jobs: int, log: TextIO, console: Console) -> verify.InstructionSet:
    """Build the kernels for one instruction set after the other until one passes verification, then everything else."""
    wanted = verify.instruction_sets()
    for number, chosen in enumerate(wanted):
        _configure(plan, chosen, log, console)
        _make(plan, [KERNELS], jobs, log, console, f"building the kernels ({chosen.description})")
        fault = verify.verify_kernels(plan.tree / "build" / "bin")
        if fault is None:
            _make(plan, PROGRAMS, jobs, log, console, f"building llama.cpp for {plan.backend}")
            return chosen
        log.write(f"verification of {chosen.name}: {fault}\n")
        if number + 1 < len(wanted):
            say(console, f"the kernels built for {chosen.description} fail here ({fault}): going on with {wanted[number + 1].description}")
    raise UserError(f"the built kernels fail on this machine even with {chosen.description} ({fault}): please report it with {log.name}")


def _configure(plan: Plan, chosen: verify.InstructionSet, log: TextIO, console: Console) -> None:
    tools = plan.toolchain
    definitions = [*plan.options, *chosen.definitions]
    if tools.nvcc is not None:
        definitions.append(f"CMAKE_CUDA_COMPILER={tools.nvcc}")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"] if tools.ninja else ["-G", "Unix Makefiles"]
    command: list[str | Path] = [
        tools.cmake,
        "-S",
        plan.tree,
        "-B",
        plan.tree / "build",
        *generator,
        *(f"-D{item}" for item in definitions),
    ]
    with console.status("configuring llama.cpp"):
        # llama.cpp asks git for its commit: do not let it find a repository around the cache folder.
        run_step(command, log, lambda line: None, {"GIT_CEILING_DIRECTORIES": str(plan.tree.parent)})


def _make(plan: Plan, targets: Sequence[str], jobs: int, log: TextIO, console: Console, title: str) -> None:
    command: list[str | Path] = [plan.toolchain.cmake, "--build", plan.tree / "build", "--parallel", str(jobs), "--target", *targets]
    with BuildProgress(console, title) as progress:
        run_step(command, log, progress.line)


def _check_result(backend: str, folder: Path) -> None:
    """Check that all programs exist, and that one that links all libraries runs and passes."""
    missing = [name for name in PROGRAMS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"the build made no {missing[0]}: use the pinned llama.cpp, or a tree of the same age with --source")
    if backend == "cuda" and find_tool("nvidia-smi") is None:
        return  # built for another machine: without the driver's libcuda nothing starts here
    done = subprocess.run([folder / FINAL_CHECK], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "FAILED" in line or "error" in line.lower()]
        reason = said[0] if said else f"exit code {done.returncode}"
        raise UserError(f"llama.cpp was built but its own check {FINAL_CHECK} fails ({reason}): please report it")


@contextmanager
def _locked(name: str, console: Console) -> Iterator[None]:
    path = cache_root() / "locks" / f"{name}.lock"
    with file_lock(path, lambda: say(console, "another mbq-gguf is building the same llama.cpp: waiting for it")):
        yield


def _remove_unfinished(current: str) -> None:
    """Remove trees without a marker that no process is building, left by a killed process or a power cut."""
    for tree in (cache_root() / "builds").glob("*"):
        if read_record(tree):
            continue
        if tree.name == current:  # its lock is held by this process
            shutil.rmtree(tree)
            continue
        with file_lock(cache_root() / "locks" / f"{tree.name}.lock") as free:
            if free:
                shutil.rmtree(tree)
