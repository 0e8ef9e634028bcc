"""The patch's C and C++ under AddressSanitizer and UBSan: hostile rows for every kernel of the CPU (tools/fuzz_c)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "fuzz_c"
ROWS = 300  # of each kernel; 100000 by command (docs/log.md)
KERNELS = 24  # five of each of four types, the products with one scale a row, and attention over two types of cache
SETS = {"as it is": "-march=native", "scalar": ""}


def has_sanitizers(folder: Path) -> bool:
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    command = ["cc", "-fsanitize=address,undefined", folder / "empty.c", "-o", folder / "empty"]
    return all(map(shutil.which, ("cc", "c++", "make"))) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(platform.system() != "Linux", reason="the Makefile's options are those of GCC and clang on Linux")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "as it is" else pytest.mark.slow) for name in SETS])
def test_hostile_rows_do_no_harm(built_llama: Path, tmp_path: Path, name: str) -> None:
    if not has_sanitizers(tmp_path):
        pytest.skip("no make and compiler with AddressSanitizer and UBSan")
    make = ["make", "-j2", "-C", FOLDER, f"LLAMA={built_llama}", f"OUT={tmp_path}", f"ISA={SETS[name]}"]
    made = subprocess.run(make, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([tmp_path / "fuzz", str(ROWS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == KERNELS
    assert all(int(line.rsplit(" ", 1)[1]) >= ROWS for line in done.stdout.splitlines())
