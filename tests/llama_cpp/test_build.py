"""The whole way from a source package to a finished build, with a tiny tree, and every way in which it can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp import machine, paths, verify
from mbq_gguf.llama_cpp.build import build, make_plan
from mbq_gguf.llama_cpp.cache import MARKER, read_record
from workshop_tree import PATCH, Workshop

# Runs build() in a process of its own, with the patch folder and the proof of the test.
RUNNER = """
import sys
from pathlib import Path
from mbq_gguf.llama_cpp import pin, verify
from mbq_gguf.llama_cpp.build import build
root = Path(sys.argv[1])
pin.patch_dir = lambda: root / "ggml_patch"
verify.CHECK_PROGRAM = root / "proof.py"
build(source=root / "tree")
"""


def start_build(workshop: Workshop) -> subprocess.Popen[str]:
    # A shell's background jobs ignore SIGINT and hand that down; the test means a process that does not.
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, workshop.root],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_from_the_package_to_a_build_and_then_at_once(workshop: Workshop) -> None:
    package = workshop.make_package()
    tree = build(console=workshop.console)
    assert subprocess.run([tree / "build" / "bin" / "llama-server"], check=False).returncode == 0
    assert not (tree / ".git").exists()
    assert not (tree / "elsewhere").exists()
    assert not workshop.witness.exists(), "the package is unpacked, and no code of it runs"
    assert paths.source_dir() == tree
    assert paths.find_program("llama-server") == tree / "build" / "bin" / "llama-server"
    assert paths.find_library("libggml-cpu.so") == paths.find_library("ggml-cpu") == paths.find("libggml-cpu.so")
    package.unlink()  # a second build that fetched anything would fail
    before = (tree / "build" / "bin" / "llama-server").stat().st_mtime_ns
    assert build(console=workshop.console) == tree
    assert (tree / "build" / "bin" / "llama-server").stat().st_mtime_ns == before
    assert "is built already" in workshop.printed()
    assert workshop.builds() == [tree.name]


def test_a_build_survives_being_moved(workshop: Workshop) -> None:
    tree = build(source=workshop.tree, console=workshop.console)
    moved = tree.rename(workshop.root / "moved")
    assert subprocess.run([moved / "build" / "bin" / "llama-bench"], check=False).returncode == 0


def test_the_source_is_copied_and_never_edited(workshop: Workshop) -> None:
    before = {path: path.read_bytes() for path in workshop.tree.rglob("*") if path.is_file()}
    build(source=workshop.tree, console=workshop.console)
    assert {path: path.read_bytes() for path in workshop.tree.rglob("*") if path.is_file()} == before


def test_a_finished_build_may_be_the_source_of_another(workshop: Workshop) -> None:
    first = build(source=workshop.tree, console=workshop.console)
    second = build(source=first, console=workshop.console)
    assert first != second
    assert read_record(second) != read_record(first)


def test_another_package_of_the_same_name_is_refused_before_any_code_of_it_runs(workshop: Workshop) -> None:
    workshop.make_package()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "tinyllama==1.0"]
    subprocess.run(pip, cwd=workshop.root, capture_output=True, check=False)
    assert workshop.witness.exists(), "a plain download runs it, or this test shows nothing"
    workshop.witness.unlink()
    workshop.write_pin("ab" * 32)
    with pytest.raises(UserError, match=r"^tinyllama==1\.0 has the sha256 \w{12}\.\.\. where the pin says abababababab\.\.\.: "):
        build(console=workshop.console)
    assert not workshop.witness.exists()
    assert workshop.builds() == []
    assert not list((workshop.cache / "downloads").rglob("*.tar.gz"))


def test_a_package_that_pip_cannot_find(workshop: Workshop) -> None:
    with pytest.raises(UserError, match=r"^pip could not download tinyllama==1\.0 \(.*\): .*--source"):
        build(console=workshop.console)
    assert workshop.builds() == []


def test_a_patch_that_does_not_apply(workshop: Workshop) -> None:
    (workshop.patch / "patches" / "0001-answer.patch").write_text(PATCH.replace("return 7", "return 8"))
    with pytest.raises(UserError, match=r"0001-answer\.patch does not apply to kernel\.c"):
        build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


def test_a_patch_that_is_edited_while_it_is_built_needs_another_build(workshop: Workshop) -> None:
    header, cmake = workshop.patch / "src" / "mbq-answer.h", workshop.tree / "CMakeLists.txt"
    cmake.write_text(cmake.read_text() + f'file(APPEND "{header}" "// later")\n')
    tree = build(source=workshop.tree, console=workshop.console)
    assert header.read_text().startswith((tree / "mbq-answer.h").read_text())
    with pytest.raises(UserError, match="the patch has changed since"):
        paths.source_dir()


def test_a_compiler_error_is_one_sentence_and_leaves_only_the_log(workshop: Workshop) -> None:
    (workshop.tree / "main.c").write_text("int main(void) { return nothing_like_this; }\n")
    with pytest.raises(UserError, match=r"main\.c:1:\d+: error: .*nothing_like_this.*\): see the whole log in (.+\.log)$") as caught:
        build(source=workshop.tree, console=workshop.console)
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).rpartition("the whole log in ")[2])
    assert "nothing_like_this" in log.read_text()
    assert workshop.builds() == []


def test_a_full_disk_while_compiling(workshop: Workshop) -> None:
    with (workshop.tree / "CMakeLists.txt").open("a") as stream:
        # /dev/full answers every write as a full disk does.
        stream.write("add_custom_target(fill COMMAND cp CMakeCache.txt /dev/full)\nadd_dependencies(ggml-cpu fill)\n")
    with pytest.raises(UserError, match=r"^the disk that holds .* is full: free"):
        build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


def test_a_cache_that_cannot_be_written(workshop: Workshop) -> None:
    workshop.cache.write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"^cannot write the build in .*MBQ_GGUF_CACHE"):
        build(source=workshop.tree, console=workshop.console)


def test_a_tree_that_makes_no_server(workshop: Workshop) -> None:
    cmake = workshop.tree / "CMakeLists.txt"
    cmake.write_text(cmake.read_text().replace("llama-server", "other-server"))
    with pytest.raises(UserError, match="llama-server"):
        build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


def test_a_check_that_fails_after_the_build(workshop: Workshop) -> None:
    (workshop.tree / "main.c").write_text("int main(void) { return 3; }\n")
    with pytest.raises(UserError, match=r"its own check test-quantize-fns fails \(exit code 3\)"):
        build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


def test_kernels_that_fault_are_built_again_without(workshop: Workshop) -> None:
    (workshop.patch / "src" / "mbq-answer.h").write_text("#define MBQ_ANSWER (NATIVE ? (__builtin_trap(), 0) : 42)\n")
    tree = build(source=workshop.tree, console=workshop.console)
    record = read_record(tree)
    assert record is not None
    assert record.instruction_set in ("avx2", "baseline")
    told = [line for line in workshop.printed().splitlines() if "fail here" in line]
    natives = [wanted for wanted in verify.instruction_sets() if "GGML_NATIVE=ON" in wanted.definitions]
    assert len(told) == len(natives)
    assert "at the one kernel" in told[0]


def test_kernels_that_always_fault(workshop: Workshop) -> None:
    (workshop.patch / "src" / "mbq-answer.h").write_text("#define MBQ_ANSWER (__builtin_trap(), 0)\n")
    with pytest.raises(UserError, match=r"^the built kernels fail on this machine even with no optional instruction set \("):
        build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(workshop: Workshop, number: signal.Signals) -> None:
    nap = f"sleep 5{os.getpid()}.25"  # a command line that nobody else has
    with (workshop.tree / "CMakeLists.txt").open("a") as stream:
        stream.write(f"add_custom_target(nap COMMAND {nap})\nadd_dependencies(ggml-cpu nap)\n")
    process = start_build(workshop)
    wait_for(lambda: any(line.startswith(nap) for line in command_lines()))
    assert workshop.builds(), "the build had begun"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert workshop.builds() == []
    wait_for(lambda: not any(line.startswith(nap) for line in command_lines()), seconds=5)  # it has its signal, and naps for hours


def test_what_a_killed_build_left_is_removed_by_the_next(workshop: Workshop) -> None:
    left = workshop.cache / "builds" / "cpu-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "half.c").write_text("")
    tree = build(source=workshop.tree, console=workshop.console)
    assert workshop.builds() == [tree.name]


def test_two_builds_at_once_make_one(workshop: Workshop) -> None:
    both = [start_build(workshop) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(workshop.builds()) == 1
    assert sum("built already" in text for text in said) == 1


def test_the_key_follows_patch_source_and_flags(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return make_plan("cpu", workshop.tree, None).key

    keys = [key(), key()]
    assert keys[0] == keys[1]
    (workshop.patch / "src" / "mbq-answer.h").write_text("#define MBQ_ANSWER 43\n")
    keys.append(key())
    (workshop.tree / "main.c").write_text("/* other */")
    keys.append(key())
    monkeypatch.setenv("CXXFLAGS", "-g")
    keys.append(key())
    keys.append(make_plan("cpu", None, None).key)
    assert len(set(keys)) == 5


def test_wrong_calls(workshop: Workshop) -> None:
    with pytest.raises(UsageError, match="backend 'metal' is unknown: use one of cpu, cuda"):
        build("metal", console=workshop.console)
    with pytest.raises(UsageError, match=r"is not a llama\.cpp source tree"):
        build(source=workshop.root, console=workshop.console)
    with pytest.raises(UsageError, match="--jobs is 0"):
        build(jobs=0, console=workshop.console)


@pytest.mark.parametrize(
    ("present", "backend", "says"),
    [
        (("git", "ninja", "cmake"), "cpu", "no C and C\\+\\+ compiler was found"),
        (("cc", "c++", "ninja", "cmake"), "cpu", "git was not found"),
        (("cc", "c++", "git", "ninja"), "cpu", "cmake was not found"),
        (("cc", "c++", "git", "cmake"), "cpu", "neither ninja nor make was found"),
        (("cc", "c++", "git", "cmake", "make"), "cuda", "nvcc was not found"),
        (("cc", "c++", "git", "cmake", "make", "nvcc"), "cuda", "no NVIDIA GPU is visible"),
    ],
)
def test_a_missing_tool_is_one_sentence(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], backend: str, says: str
) -> None:
    only = workshop.root / "bin"
    only.mkdir()
    for name in present:
        (only / name).write_text("#!/bin/sh\necho 1.0\n")
        (only / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(only))
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(only))
    monkeypatch.setattr(machine, "CUDA_HOME", str(only))
    for name in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says):
        build(backend, source=workshop.tree, console=workshop.console)
    assert workshop.builds() == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems share their C++ library")
def test_a_compiler_without_a_shared_runtime_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = workshop.root / "bare-g++"  # as a GCC that has libstdc++ as an archive alone: a name that it does not find comes back as it was
    bare.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("CXX", str(bare))
    with pytest.raises(UserError, match=r"bare-g\+\+ has no shared C\+\+ library.*set CC and CXX"):
        build(source=workshop.tree, console=workshop.console)


def test_without_ninja_make_does(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    if machine.find_tool("make") is None:
        pytest.skip("make is not installed")
    find = machine.find_tool
    monkeypatch.setattr(machine, "find_tool", lambda *names: None if "ninja" in names else find(*names))
    tree = build(source=workshop.tree, console=workshop.console)
    assert (tree / "build" / "Makefile").is_file()
    assert (tree / MARKER).is_file()
