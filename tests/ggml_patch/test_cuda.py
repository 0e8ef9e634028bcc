"""The CUDA kernels: they compile within their bounds of registers and spills, and on a GPU ggml's own tests and the sanitizer agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import paths

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "ggml_patch" / "src" / "ggml" / "src" / "ggml-cuda" / "mbq.cu"
# Architecture -> the most registers and bytes of spills that any kernel may take. 65536 registers are shared by 16 warps of mbq_mmv, which
# makes 128 for a thread, and by 12 of mbq_gemm, 168.
BOUNDS: dict[str, dict[str, int]] = json.loads((HERE / "cuda_resources.json").read_text())
OPERATIONS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY")
FUNCTION = re.compile(
    r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+.*?Used (\d+) registers"
)


def compile_kernels(architecture: str, work: Path) -> str:
    """What the assembler says of each kernel. Skips where there is no CUDA compiler or no patched llama.cpp to compile against."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    try:
        tree = paths.source_dir() / "ggml"
    except UserError as error:
        pytest.skip(str(error))
    folders = [tree / "src" / "ggml-cuda", tree / "src", tree / "include", HERE / "cublas"]
    options = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Xptxas", "-v", *(f"-I{folder}" for folder in folders)]
    command = [nvcc, *options, f"-arch=sm_{architecture}", "-cubin", "-o", str(work / "mbq.cubin"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=() if name == "90a" else pytest.mark.slow) for name in BOUNDS])
def test_kernels_keep_within_registers(architecture: str, tmp_path: Path) -> None:
    said = compile_kernels(architecture, tmp_path)
    assert "serialized" not in said, "wgmma waits for registers after every instruction"
    kernels = FUNCTION.findall(said)
    products = [kernel for kernel in kernels if "mbq_mmv" in kernel[0]]
    assert len(products) == 16, "two block sizes times one and up to 8, 16 and 32 columns, with and without the tensor memory accelerator"
    for name, stores, loads, registers in kernels:
        assert int(registers) <= BOUNDS[architecture]["gemm_registers" if "mbq_gemm" in name else "registers"], name
        assert int(stores) + int(loads) <= BOUNDS[architecture]["spill_bytes"], name


def backend_ops(operation: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Ggml's comparison of the GPU with the CPU, for the MBQ types."""
    program = paths.find_program("test-backend-ops")
    command = [*prefix, str(program), "test", "-o", operation, "-b", "CUDA0", "-p", "mbq3"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_backend_ops(operation: str) -> None:
    done = backend_ops(operation)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "FAIL" not in done.stdout
    assert done.stdout.count("OK") > 2, "no case ran"


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID"])
def test_sanitizer(operation: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    done = backend_ops(operation, sanitizer, "--tool", tool, "--error-exitcode", "9")
    assert done.returncode == 0, done.stdout[-2000:]
