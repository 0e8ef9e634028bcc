"""tools/tower_timeline.py: the recorder in front of a runtime that does nothing, and how passes are summarised; times need a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tower_timeline
from tower_timeline import Call

# A CUDA runtime whose calls do nothing, but that a graph takes 1.5 ms
RUNTIME = """
int cudaMemcpyAsync(void *a, const void *b, unsigned long n, int k, void *s) { return 0; }
int cudaStreamSynchronize(void *s) { return 0; }
int cudaEventCreate(void **e) { static int some; *e = &some; return 0; }
int cudaEventRecord(void *e, void *s) { return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1.5f; return 0; }
int cudaGraphLaunch(void *g, void *s) { return 0; }
void a_pass(void) { cudaMemcpyAsync(0, 0, 123, 1, 0); cudaGraphLaunch(0, 0); cudaStreamSynchronize(0); }
"""
PROGRAM = """
import ctypes, sys, tower_timeline
runtime = ctypes.CDLL(sys.argv[2])  # as cbind opens libraries: without exposing their symbols
recorder = ctypes.CDLL(sys.argv[1])
runtime.a_pass()
calls = tower_timeline.recorded(recorder, runtime.a_pass)
assert all(0 <= before.begin <= before.end <= after.begin for before, after in zip(calls, calls[1:])), calls
print([(call.name, call.bytes, call.gpu) for call in calls])
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_calls_of_a_pass_are_recorded_in_order(tmp_path: Path) -> None:
    library = tower_timeline.compiled(tmp_path)
    (tmp_path / "runtime.c").write_text(RUNTIME)
    runtime = tmp_path / "libcudart.so.13"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", "-o", runtime, tmp_path / "runtime.c"], check=True)
    path = os.pathsep.join([str(Path(tower_timeline.__file__).parent), *sys.path])
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM, library, runtime], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('cudaMemcpyAsync', 123, 0.0), ('cudaGraphLaunch', 0, 1.5), ('cudaStreamSynchronize', 0, 0.0)]"


def test_passes_with_other_calls_do_not_count() -> None:
    passes = [[Call("copy", begin, begin + 1, 8, 0.0), Call("graph", 4.0, 5.0, 0, begin)] for begin in (1.0, 2.0, 9.0)]
    odd = [Call("copy", 100.0, 101.0, 8, 0.0)]
    assert tower_timeline.median_of([odd, *passes]) == [Call("copy", 2.0, 3.0, 8, 0.0), Call("graph", 4.0, 5.0, 0, 2.0)]
