"""Where the built llama.cpp is searched, and the message if there is none."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner
from mbq_gguf.cli import main
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp import paths
from mbq_gguf.llama_cpp.build import build
from mbq_gguf.llama_cpp.cache import MARKER, read_record, write_record
from workshop_tree import Workshop


def test_nothing_built(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="run `mbq-gguf build` first"):
        paths.source_dir()
    monkeypatch.setenv("MBQ_GGUF_BACKEND", "cuda")
    with pytest.raises(UserError, match="run `mbq-gguf build --backend cuda` first"):
        paths.find_program("llama-server")
    monkeypatch.setenv("MBQ_GGUF_BACKEND", "abacus")
    with pytest.raises(UsageError, match="MBQ_GGUF_BACKEND is 'abacus': set it to one of cpu, cuda"):
        paths.source_dir()


def test_layers_on_a_gpu_need_a_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBQ_GGUF_LLAMA_CPP", raising=False)
    monkeypatch.delenv("MBQ_GGUF_BACKEND", raising=False)
    paths.check_gpu_layers(0)
    for command in (["ask", "out.gguf", "What?", "--gpu-layers", "99"], ["eval", "bf16.gguf", "out.gguf", "--gpu-layers", "-1"]):
        ended = CliRunner().invoke(main, command)
        assert ended.exit_code == 2
        assert "--gpu-layers needs a build for a GPU: run `mbq-gguf build --backend cuda` once" in ended.output
    monkeypatch.setenv("MBQ_GGUF_BACKEND", "cuda")
    paths.check_gpu_layers(99)
    monkeypatch.delenv("MBQ_GGUF_BACKEND")
    monkeypatch.setenv("MBQ_GGUF_LLAMA_CPP", "tree")  # what it was built for is unknown
    paths.check_gpu_layers(99)


def test_the_variable_wins_over_the_cache(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = workshop.root / "mine"
    monkeypatch.setenv("MBQ_GGUF_LLAMA_CPP", str(tree))
    with pytest.raises(UsageError, match="which has no build/bin"):
        paths.source_dir()
    folder = tree / "build" / "bin"
    folder.mkdir(parents=True)
    (folder / "llama-server").write_text("")
    (folder / f"libllama{paths.LIBRARY_SUFFIX}").write_text("")
    assert paths.find("source") == tree
    assert paths.find("llama-server") == folder / "llama-server"
    assert paths.find("libllama") == paths.find_library("llama") == folder / f"libllama{paths.LIBRARY_SUFFIX}"
    with pytest.raises(UserError, match="the program llama-cli is not in the build"):
        paths.find("llama-cli")


def test_only_a_build_of_todays_patch_and_machine_counts(workshop: Workshop) -> None:
    tree = build(source=workshop.tree, console=workshop.console)
    assert paths.source_dir() == tree
    header = workshop.patch / "src" / "mbq-answer.h"
    before = header.read_text()
    header.write_text(before + "\n")
    with pytest.raises(UserError, match=r"the patch has changed since llama\.cpp was built for cpu"):
        paths.source_dir()
    header.write_text(before)
    record = read_record(tree)
    assert record is not None
    write_record(tree, type(record)(**{**vars(record), "machine": "another"}))
    with pytest.raises(UserError, match="not built yet"):
        paths.source_dir()
    (tree / MARKER).write_text("{ not whole")
    with pytest.raises(UserError, match="not built yet"):
        paths.source_dir()


def test_the_build_asked_for_last_is_the_one_in_use(workshop: Workshop) -> None:
    first = build(source=workshop.tree, console=workshop.console)
    other = shutil.copytree(workshop.tree, workshop.root / "other")
    (other / "new.c").write_text("")
    second = build(source=other, console=workshop.console)
    assert first != second
    assert paths.source_dir() == second
    build(source=workshop.tree, console=workshop.console)
    assert paths.source_dir() == first
