"""Which libraries are loaded into the process, and when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mbq_cbind.library import _log_line, take_error

# Converts, then prints the files that lie in the process's memory.
PROGRAM = """
import sys
from pathlib import Path
from mbq_gguf.convert import ConvertOptions, convert
from rich.console import Console

model, out, device = sys.argv[1:]
convert(ConvertOptions(Path(model), Path(out), type="Q4_0", samples=4, synthetic=0, device=device), Console(stderr=True))
print("opened", *{Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line})
"""


def converted(model_dir: Path, out: Path, device: str, **environment: str) -> str:
    """The names of the files that a conversion has opened and mapped."""
    command = [sys.executable, "-c", PROGRAM, str(model_dir), str(out), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.partition("opened")[2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has opened")
def test_converting_opens_nothing_of_a_gpu(tiny_dir: Path, tmp_path: Path) -> None:
    """A CUDA backend beside torch's CUDA libraries has made cuDNN crash, and the converter needs none."""
    opened = converted(tiny_dir, tmp_path / "tiny.gguf", "cpu")
    assert set(re.findall(r"lib(?:ggml[a-z-]*|llama|mtmd)(?=\.)", opened)) == {"libggml-base", "libggml-cpu"}
    assert "libcublas" not in opened


@pytest.mark.gpu
def test_converting_on_a_card_with_a_cuda_build(tiny_dir: Path, tmp_path: Path) -> None:
    """Torch's convolutions live with the CUDA build of llama.cpp: three of three such conversions died with SIGSEGV."""
    opened = converted(tiny_dir, tmp_path / "tiny.gguf", "cuda", MBQ_GGUF_BACKEND="cuda")
    assert "libggml-base" in opened
    assert "libggml-cuda" not in opened


def test_without_a_build_it_says_so() -> None:
    program = "from mbq_cbind.library import load; load()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "BindingError: no llama.cpp was named" in done.stderr


def test_two_lines_of_a_log_become_one() -> None:
    """libmtmd says an error and a hint at once, and an error of ours is one sentence."""
    take_error("")
    _log_line(4, b"error: mismatch\nhint: another mmproj\n")
    assert take_error("unknown") == "error: mismatch hint: another mmproj"
