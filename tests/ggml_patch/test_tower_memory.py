"""Memory that a tower keeps between pictures, and its inputs, in programs with AddressSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from mbq_gguf.llama_cpp import paths
from test_kernels import compiler


@pytest.mark.parametrize("name", ["tower_rows", "kept_graphs", "picture_pixels", "picture_patches"])
def test_memory_of_towers(name: str, built_llama: Path, tmp_path: Path) -> None:
    libraries, program = paths.find_library("ggml-base").parent, tmp_path / name
    command = [compiler("c++"), "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command += [f"-I{built_llama / folder}" for folder in ("ggml/include", "tools/mtmd")]
    command += [str(Path(__file__).parent / f"{name}.cpp"), "-o", str(program), f"-L{libraries}", "-lggml-base", "-lggml-cpu", "-pthread"]
    subprocess.run([*command, f"-Wl,-rpath,{libraries}"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
