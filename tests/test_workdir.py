"""The work directory: only complete items, and only for one fingerprint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.workdir import TEMPORARY, NoWorkDir, open_workdir
from safetensors.torch import save_file

MARK = {"model": "m1", "data": "d1", "settings": "s1"}


def test_items_come_back(tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    assert work.load("a") is None
    work.save("a", {"x": torch.arange(6, dtype=torch.uint8).view(2, 3).t()}, {"kind": ["MBQ3", 3]})
    found = open_workdir(tmp_path / "work", MARK).load("a")
    assert found is not None
    assert torch.equal(found[0]["x"], torch.arange(6, dtype=torch.uint8).view(2, 3).t())
    assert found[1] == {"kind": ["MBQ3", 3]}


def test_an_item_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> tuple[dict[str, torch.Tensor], int]:
        made.append(1)
        return {"x": torch.ones(2)}, len(made)

    work = open_workdir(tmp_path / "work", MARK)
    for _ in range(3):
        tensors, data = work.cached("a", make)
        assert torch.equal(tensors["x"], torch.ones(2))
        assert data == 1
    assert [NoWorkDir().cached("a", make)[1] for _ in range(2)] == [2, 3]


@pytest.mark.parametrize("part", sorted(MARK))
def test_another_fingerprint_is_refused(tmp_path: Path, part: str) -> None:
    open_workdir(tmp_path / "work", MARK)
    with pytest.raises(UsageError, match=f"differs in its {part}: remove it or choose another"):
        open_workdir(tmp_path / "work", {**MARK, part: "other"})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and not a work directory"):
        open_workdir(tmp_path, MARK)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        open_workdir(tmp_path / "file", MARK)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def with_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and leave its tensors as they are."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "letter.txt").touch()


def as_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def other_tensor(file: Path) -> None:
    save_file({"y": torch.ones(100)}, file, metadata={"data": "{}", "checksum": "0" * 64})


NESTED = "[" * 100_000
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, 60),
    "a tensor cut short": lambda file: os.truncate(file, file.stat().st_size - 4),
    "empty": lambda file: os.truncate(file, 0),
    "a bit of a weight": lambda file: flip(file, -5),
    "two bits of a weight": lambda file: (flip(file, -5), flip(file, -9)),
    "other data": lambda file: with_header(file, lambda header: header["__metadata__"].update(data='{"kind": 2}')),
    "nested data": lambda file: with_header(file, lambda header: header["__metadata__"].update(data=NESTED)),
    "no data": lambda file: with_header(file, lambda header: header["__metadata__"].pop("data")),
    "no checksum": lambda file: with_header(file, lambda header: header["__metadata__"].pop("checksum")),
    "no metadata": lambda file: with_header(file, lambda header: header.pop("__metadata__")),
    "another shape": lambda file: with_header(file, lambda header: header["x"].update(shape=[10, 10])),
    "another type": lambda file: with_header(file, lambda header: header["x"].update(dtype="I32")),
    "another name": lambda file: with_header(file, lambda header: header.update(y=header.pop("x"))),
    "another tensor": other_tensor,
    "text": lambda file: file.write_text("text"),
    "nested header": lambda file: file.write_bytes(len(NESTED).to_bytes(8, "little") + NESTED.encode()),
    "folder": as_folder,
    "link to nothing": as_link,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_item_is_told_and_made_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    told: list[str] = []
    work = open_workdir(tmp_path / "work", MARK, told.append)
    work.save("a", {"x": torch.ones(100)}, {"kind": 1})
    damage(work.path / "a.safetensors")
    assert work.load("a") is None
    assert len(told) == 1
    assert told[0].startswith(f"{work.path / 'a.safetensors'} is damaged (")
    assert told[0].endswith("): it will be computed again")
    work.save("a", {"x": torch.ones(100)}, {"kind": 1})
    found = work.load("a")
    assert found is not None
    assert found[1] == {"kind": 1}
    assert len(told) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", NESTED, "7", None], ids=["empty", "list", "cut", "nested", "number", "folder"])
def test_damaged_fingerprint_is_made_again_and_items_stay(content: str | None, tmp_path: Path) -> None:
    told: list[str] = []
    work = open_workdir(tmp_path / "work", MARK)
    work.save("a", {"x": torch.ones(100)}, {})
    file = work.path / "fingerprint.json"
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_text(content)
    assert open_workdir(tmp_path / "work", MARK, told.append).load("a") is not None
    assert told == [f"{file} is damaged: it will be written again"]
    assert json.loads(file.read_text()) == MARK


def test_items_serve_no_other_run(tmp_path: Path) -> None:
    """Not even where fingerprint.json has been lost and the next run wrote its own."""
    open_workdir(tmp_path / "work", MARK).save("a", {"x": torch.ones(100)}, {})
    (tmp_path / "work" / "fingerprint.json").write_text("[]")
    assert open_workdir(tmp_path / "work", {**MARK, "model": "other"}).load("a") is None


def test_an_item_under_anothers_name_is_told(tmp_path: Path) -> None:
    """One layer's file copied over another's is whole, but not that layer's (tests/fuzz found it taken)."""
    told: list[str] = []
    work = open_workdir(tmp_path / "work", MARK, told.append)
    work.save("a", {"x": torch.ones(100)}, {})
    shutil.copy(work.path / "a.safetensors", work.path / "b.safetensors")
    assert work.load("b") is None
    assert told == [f"{work.path / 'b.safetensors'} is damaged (its checksum differs): it will be computed again"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    (work.path / f"{TEMPORARY}0123").touch()
    (work.path / f"{TEMPORARY}folder" / "inside").mkdir(parents=True)
    (work.path / f"{TEMPORARY}link").symlink_to("nowhere")
    open_workdir(tmp_path / "work", MARK)
    assert [file.name for file in work.path.iterdir()] == ["fingerprint.json"]


def test_all_that_is_unfinished_is_known_by_its_name(tmp_path: Path) -> None:
    """safetensors writes to a file of its own first (.tmpXXXXXX), which a killed run would leave for good beside the items."""
    work = open_workdir(tmp_path / "work", MARK)
    with ThreadPoolExecutor(1) as thread:
        saving = thread.submit(work.save, "a", {"x": torch.ones(50_000_000)}, {})  # 200 MB take 0.1 s and more
        seen: set[str] = set()
        while not saving.done():
            seen.update(os.listdir(work.path))
    unfinished = seen - {"fingerprint.json", "a.safetensors"}
    assert unfinished
    assert all(name.startswith(TEMPORARY) for name in unfinished)


def test_items_have_the_usual_permissions(tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    work.save("a", {"x": torch.ones(1)}, {})
    assert (work.path / "a.safetensors").stat().st_mode == (work.path / "fingerprint.json").stat().st_mode


def test_a_link_under_an_items_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    work = open_workdir(tmp_path / "work", MARK)
    (work.path / "a.safetensors").symlink_to(tmp_path / "precious")
    work.save("a", {"x": torch.ones(1)}, {})
    assert (tmp_path / "precious").read_text() == "precious"
    assert work.load("a") is not None


TYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.bool]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_and_shape_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    work = open_workdir(tmp_path / "work", MARK)
    tensors = {"scalar": torch.ones((), dtype=dtype), "none": torch.ones((0, 3), dtype=dtype), "cube": torch.ones((2, 3, 4), dtype=dtype)}
    work.save("a", tensors, None)
    found = work.load("a")
    assert found is not None
    assert all(torch.equal(found[0][name], value) for name, value in tensors.items())


def test_a_write_that_fails_leaves_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = open_workdir(tmp_path / "work", MARK)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        work.save("a", {"x": torch.ones(1)}, {})
    assert [file.name for file in work.path.iterdir()] == ["fingerprint.json"]
