"""Multi-threaded work on the host continues if the system refuses to start threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mbq_gguf.llama_cpp import pin
from test_kernels import compiler


def test_without_threads_the_caller_does_it_all(tmp_path: Path) -> None:
    program = tmp_path / "no_threads"
    source, headers = Path(__file__).parent / "no_threads.cpp", pin.patch_dir() / "src" / "ggml" / "include"
    subprocess.run([compiler("c++"), "-std=c++17", "-O1", "-pthread", f"-I{headers}", source, "-o", program, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
