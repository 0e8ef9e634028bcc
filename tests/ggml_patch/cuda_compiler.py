"""The CUDA compiler, for tests of kernels with and without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import paths

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "ggml_patch" / "src" / "ggml" / "src" / "ggml-cuda" / "mbq.cu"


def nvcc(*arguments: str) -> str:
    """What the CUDA compiler says. Skips if there is none, or no patched llama.cpp to compile against."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    try:
        tree = paths.source_dir() / "ggml"
    except UserError as error:
        pytest.skip(str(error))
    folders = [SOURCE.parent, tree / "src" / "ggml-cuda", tree / "src", tree / "include", HERE / "cublas"]
    command = [compiler, "-std=c++17", "-extended-lambda", *(f"-I{folder}" for folder in folders), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr
