"""Declarations are read from headers, and disagreement between headers, compiler, cffi and libraries is detected."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mbq_cbind import declarations as module
from mbq_cbind.declarations import Declarations, declarations, layout, new_ffi
from mbq_cbind.errors import BindingError
from mbq_cbind.library import check_layout, check_libraries, check_whole, load, load_whole


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The headers of the built tree, to be edited, beside an empty folder for what is read from them."""
    source = load().tree
    for folder in module.INCLUDE_DIRS:
        (tmp_path / "tree" / folder).mkdir(parents=True)
        for header in (source / folder).glob("*.h"):
            shutil.copy(header, tmp_path / "tree" / folder)
    return tmp_path / "tree"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def read(tree: Path) -> Declarations:
    return declarations(tree, tree.parent / "cache")


def agrees(found: Declarations) -> bool:
    return layout(new_ffi(found.cdef), found.cdef) == found.layout


def test_layout_is_the_compilers(tree: Path) -> None:
    found = read(tree)
    assert agrees(found)
    assert found.layout["struct ggml_tensor.ne"] == 16
    assert (found.layout["GGML_TYPE_MBQ3"], found.layout["GGML_TYPE_MBQ3S_64"]) == (120, 123)


def test_a_cache_without_room_is_no_error(tree: Path) -> None:
    (tree.parent / "file").touch()
    assert agrees(declarations(tree, tree.parent / "file" / "cache"))


def test_a_changed_struct_is_read_anew(tree: Path) -> None:
    before = read(tree)
    edit(tree / "include/llama.h", "uint32_t n_ctx; ", "uint64_t added; uint32_t n_ctx; ")
    after = read(tree)
    assert after.layout["struct llama_context_params.n_ctx"] == before.layout["struct llama_context_params.n_ctx"] + 8
    assert agrees(after)


def test_the_second_reading_needs_no_compiler(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(tree)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert read(tree) == first
    edit(tree / "include/llama.h", "#define LLAMA_H", "#define LLAMA_H 1")
    with pytest.raises(BindingError, match="no C compiler"):
        read(tree)


def test_a_missing_function_is_named(tree: Path) -> None:
    edit(tree / "include/llama.h", "llama_vocab_is_eog(", "llama_vocab_ends(")
    with pytest.raises(BindingError, match="no function llama_vocab_is_eog"):
        read(tree)


def test_a_missing_header_is_named(tree: Path) -> None:
    (tree / "tools/mtmd/mtmd.h").unlink()
    with pytest.raises(BindingError, match=r"lacks the header mtmd\.h"):
        read(tree)


def test_a_broken_header_is_one_sentence(tree: Path) -> None:
    edit(tree / "include/llama.h", "typedef int32_t llama_pos;", "typedef int32_t llama_pos")
    with pytest.raises(BindingError, match="headers"):
        read(tree)


def test_a_shifted_field_is_noticed(tree: Path) -> None:
    found = read(tree)
    shifted = found.layout | {"struct llama_batch.pos": found.layout["struct llama_batch.pos"] + 4}
    with pytest.raises(BindingError, match=r"struct llama_batch\.pos"):
        check_layout(layout(new_ffi(found.cdef), found.cdef), shifted)


def test_libraries_of_another_version_are_noticed(tmp_path: Path) -> None:
    binding = load_whole()
    (tmp_path / "ggml").mkdir()
    for name in ("CMakeLists.txt", "ggml/CMakeLists.txt"):
        (tmp_path / name).write_text((binding.tree / name).read_text().replace("VERSION_MINOR ", "VERSION_MINOR 1"))
    for check in (check_libraries, check_whole):
        check(binding)
        with pytest.raises(BindingError, match="not built from that tree"):
            check(replace(binding, tree=tmp_path))


def test_another_tensor_size_is_noticed(tree: Path) -> None:
    """Libraries against headers in which a struct has grown."""
    edit(tree / "ggml/include/ggml.h", "char padding[8];", "char padding[40];")
    with pytest.raises(BindingError, match="not built from that tree"):
        check_libraries(replace(load(), ffi=new_ffi(read(tree).cdef)))
