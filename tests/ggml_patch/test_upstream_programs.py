"""llama.cpp's own test programs, from the built tree, on the MBQ types."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from mbq_gguf.llama_cpp import paths

KINDS = ("mbq3", "mbq3_64", "mbq3s", "mbq3s_64")


def run(program: str, *arguments: str) -> str:
    command = [paths.find_program(program), *arguments]
    # Threads that wait by spinning take ten times as long where other tests run beside this one.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_quantize_fns(built_llama: Path) -> None:
    """Twenty seconds for all types of ggml's; our own bounds for ours are in tests/cbind and test_kernels.py."""
    said = run("test-quantize-fns", "-v")
    for kind in KINDS:
        verdicts = dict(re.findall(rf"^ *{kind} (.*?): +(\w+) ", said, re.MULTILINE))
        assert verdicts == {"absolute quantization error": "ok", "reference implementation error": "ok", "dot product error": "ok"}


def test_products_of_one_scale_a_row_on_the_cpu(built_llama: Path) -> None:
    said = run("test-backend-ops", "test", "-b", "CPU", "-o", "ROW_SCALE")
    assert "72/72 tests passed" in said, "two types, three lengths, six numbers of columns, alone and in threes; every bit"


@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY", "SET_ROWS"])
def test_backend_ops_on_the_cpu(built_llama: Path, operation: str) -> None:
    said = run("test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", "mbq3")
    passed = re.search(r"(\d+)/(\d+) tests passed", said)
    assert passed is not None
    assert passed[1] == passed[2]
    for kind in KINDS:
        assert re.search(rf"={kind}[,)].*OK", said), f"no case of {kind} was run"
