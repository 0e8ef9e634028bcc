"""The work directory: whole items only, and only for one fingerprint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.workdir import open_workdir

MARK = {"model": "m1", "data": "d1", "settings": "s1"}


def test_items_come_back(tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    assert work.load("a") is None
    work.save("a", {"x": torch.arange(6, dtype=torch.uint8).view(2, 3).t()}, {"kind": ["MBQ3", 3]})
    found = open_workdir(tmp_path / "work", MARK).load("a")
    assert found is not None
    assert torch.equal(found[0]["x"], torch.arange(6, dtype=torch.uint8).view(2, 3).t())
    assert found[1] == {"kind": ["MBQ3", 3]}


@pytest.mark.parametrize("part", sorted(MARK))
def test_another_fingerprint_is_refused(tmp_path: Path, part: str) -> None:
    open_workdir(tmp_path / "work", MARK)
    with pytest.raises(UsageError, match=f"belongs to another {part}: remove it or choose another"):
        open_workdir(tmp_path / "work", {**MARK, part: "other"})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and no work directory"):
        open_workdir(tmp_path, MARK)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        open_workdir(tmp_path / "file", MARK)


def test_damaged_item_is_told(tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    work.save("a", {"x": torch.ones(100)}, {})
    file = work.path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
        work.load("a")


def test_a_write_that_fails_leaves_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = open_workdir(tmp_path / "work", MARK)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        work.save("a", {"x": torch.ones(1)}, {})
    assert [file.name for file in work.path.iterdir()] == ["fingerprint.json"]
