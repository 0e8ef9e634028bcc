"""Chooses the instruction sets to build for: the first whose kernels run correctly on this machine.

A CPU may list an instruction set whose kernels do not run, because hypervisors mask it or because of compiler bugs. GCC 12 declares only 8
of the 64 bytes of an AMX tile configuration as read and drops the stores of the others, so that every AMX kernel of ggml died at
``ldtilecfg`` or ``tilezero``; patch 0009 keeps those stores, so AMX should pass. Only running the built kernels can tell.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import kernel_check
from mbq_gguf.llama_cpp.machine import cpu_flags

CHECK_PROGRAM = Path(kernel_check.__file__)
CHECK_SECONDS = 300  # takes about 2 s, but an emulated machine may be a hundred times slower


@dataclass(frozen=True)
class InstructionSet:
    """One choice of instruction sets, as CMake definitions."""

    name: str
    description: str
    definitions: tuple[str, ...]


_X86_OPTIONS = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
NATIVE = InstructionSet("native", "everything that this CPU lists", ("GGML_NATIVE=ON",))
NO_AMX = InstructionSet(
    "native-without-amx",
    "everything that this CPU lists except AMX",
    # Not as compiler flags: those would recompile all 33 kernel files, of which only four use AMX (patch 0002).
    ("GGML_NATIVE=ON", "GGML_MBQ_AMX_OPTIONS=-mno-amx-tile;-mno-amx-int8;-mno-amx-bf16"),
)
AVX2 = InstructionSet("avx2", "AVX2 and FMA", ("GGML_NATIVE=OFF", *(f"GGML_{name}=ON" for name in _X86_OPTIONS)))
BASELINE = InstructionSet("baseline", "no optional instruction set", ("GGML_NATIVE=OFF", *(f"GGML_{name}=OFF" for name in _X86_OPTIONS)))


def instruction_sets() -> tuple[InstructionSet, ...]:
    """The instruction sets to try on this machine, best first, without those that the CPU does not list."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return (NATIVE, InstructionSet("baseline", "no optional instruction set", ("GGML_NATIVE=OFF",)))
    listed = set(cpu_flags())
    chosen = [NATIVE]
    if "amx_tile" in listed:
        chosen.append(NO_AMX)
    if {"avx2", "fma", "f16c", "bmi2"} <= listed:
        chosen.append(AVX2)
    return (*chosen, BASELINE)


def verify_kernels(folder: Path) -> str | None:
    """Run the kernels of ``libggml-cpu`` in `folder` in a separate process.

    Returns None if they run and agree with numpy, else a few words on what went wrong where. Raises UserError if the libraries
    cannot be loaded at all: another instruction set would not help.
    """
    command = [sys.executable, str(CHECK_PROGRAM), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        return f"no answer within {CHECK_SECONDS} s at {_last_line(said)}"
    if done.returncode == 0:
        return None
    if done.returncode == 1 and "relative error" in done.stdout:
        return f"wrong result at {_last_line(done.stdout)}"
    if done.returncode < 0:
        return f"{_signal_words(-done.returncode)} at {_last_line(done.stdout)}"
    raise UserError(f"the newly built kernels could not be tested ({_last_line(done.stdout + done.stderr)}): run `mbq-gguf build` again")


def _signal_words(number: int) -> str:
    known = {signal.SIGILL: "illegal instruction", signal.SIGSEGV: "memory fault", signal.SIGBUS: "memory fault", signal.SIGABRT: "abort"}
    return known.get(signal.Signals(number), signal.Signals(number).name)


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "the start"
