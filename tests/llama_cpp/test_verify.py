"""The verification of built kernels, run on the real build, and its message for kernels that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import kernel_check, verify


def test_the_real_kernels_are_proved(built: Path) -> None:
    assert verify.verify_kernels(built) is None


def test_every_type_runs_in_every_buffer(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "proof.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(kernel_check.__file__).parent)!r}); import kernel_check as k\n"
        "k.MAX_RELATIVE_ERROR = 1e-9\nsys.exit(k.main(sys.argv[1]))\n"
    )
    monkeypatch.setattr(verify, "CHECK_PROGRAM", program)
    fault = verify.verify_kernels(built)
    assert fault is not None
    assert fault.startswith("wrong result at ")
    assert "relative error" in fault


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os, signal; print('case 1', flush=True); os.kill(os.getpid(), signal.SIGILL)", "illegal instruction at case 1"),
        ("import os, signal; print('case 2', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "memory fault at case 2"),
        ("import os; os.abort()", "abort at the start"),
        ("import time; print('case 3', flush=True); time.sleep(60)", "no answer within 2 s at case 3"),
    ],
)
def test_how_kernels_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    (tmp_path / "proof.py").write_text(program)
    monkeypatch.setattr(verify, "CHECK_PROGRAM", tmp_path / "proof.py")
    monkeypatch.setattr(verify, "CHECK_SECONDS", 2)
    assert verify.verify_kernels(tmp_path) == says


def test_libraries_that_cannot_be_loaded_are_no_reason_to_try_another_instruction_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be tested \(cannot load the built libraries: .*libggml-base"):
        verify.verify_kernels(tmp_path)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", ("avx2", "fma", "f16c", "bmi2", "amx_tile"), ["native", "native-without-amx", "avx2", "baseline"]),
        ("x86_64", ("avx2", "fma", "f16c", "bmi2"), ["native", "avx2", "baseline"]),
        ("x86_64", ("sse2",), ["native", "baseline"]),
        ("aarch64", ("asimd", "asimddp"), ["native", "baseline"]),
    ],
)
def test_what_is_tried_in_which_order(monkeypatch: pytest.MonkeyPatch, machine: str, flags: tuple[str, ...], expected: list[str]) -> None:
    monkeypatch.setattr(verify.platform, "machine", lambda: machine)
    monkeypatch.setattr(verify, "cpu_flags", lambda: flags)
    assert [wanted.name for wanted in verify.instruction_sets()] == expected
