"""The CUDA kernels' own source, run on the CPU: which lane's sums meet which scale, and what the tensor cores of Hopper are given."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "ggml_patch" / "src" / "ggml" / "src" / "ggml-cuda"
MMA = "{ emulated_mma(d, a, b, MBQ_MAGIC); }\n"
REGISTERS = """#pragma once
#include "mbq-block.cuh"
inline const uint8_t * emulated_shared;
inline uint32_t mbq_load_shared(uint32_t address) { uint32_t v; memcpy(&v, emulated_shared + address, 4); return v; }
"""


def read(name: str) -> str:
    return (SOURCE / name).read_text(encoding="utf-8")


def replaced(pattern: str, new: str, text: str) -> str:
    """The one match of a pattern (dots match newlines) replaced: instructions of the card that C++ has no word for."""
    done, times = re.subn(pattern, lambda _: new, text, flags=re.DOTALL)
    assert times == 1, pattern
    return done


def between(text: str, begin: str, end: str) -> str:
    return text[text.index(begin) : text.index(end)]


def test_kernels_on_the_cpu(tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    sources = {name: read(name) for name in ("mbq-block.cuh", "mbq-activations-q8.cuh", "mbq-plan.cuh", "mbq-tile.cuh", "mbq-gemv.cuh")}
    sources["mbq-block.cuh"] = replaced(r"(?<=const int \(&b\)\[2\]\) )\{.*?\n\}\n", MMA, sources["mbq-block.cuh"])
    sources["mbq-tile.cuh"] = replaced(r'asm volatile\("bar\.sync[^;]*;[^;]*;', "wait_for(group + 1, KW*32);", sources["mbq-tile.cuh"])
    sources["registers.cuh"] = REGISTERS + between(read("mbq-wgmma.cuh"), "// 64 or 128 weights of a row", "#endif // MBQ_WGMMA")
    sources["dequantize.cuh"] = between(read("mbq.cu"), "template <typename L>\n", "template <typename T> static __device__")
    for name, text in sources.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    program = tmp_path / "kernels"
    options = ["-x", "c++", "-std=c++17", "-O1", "-Xcompiler", "-fno-strict-aliasing,-w", f"-I{tmp_path}"]
    done = subprocess.run([compiler, *options, str(HERE / "emulation" / "kernels.cpp"), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout
