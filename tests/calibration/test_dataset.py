"""Calibration sets: JSONL, folders, the shipped set, and invalid ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mbq_gguf.calibration.dataset import FREE_QUESTION, SHIPPED, Sample, fingerprint, load_samples, read_jsonl
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.models import LoadedModel

IMAGES = SHIPPED.parent / "images"


def write_set(folder: Path, *lines: object) -> Path:
    shutil.copy(IMAGES / "0000.png", folder / "a.png")
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LINE = {"image": "a.png", "turns": [{"question": "What?", "answer": "blue", "task": "color"}]}


def test_shipped_set_is_the_default(tiny: LoadedModel) -> None:
    drawn = load_samples(None, tiny, 8, seed=3)
    assert len(drawn) == 8
    assert all(sample in read_jsonl(SHIPPED) for sample in drawn)
    assert drawn == load_samples(None, tiny, 8, seed=3)
    assert drawn != load_samples(None, tiny, 8, seed=4)


def test_paths_are_relative_to_the_file(tiny: LoadedModel, tmp_path: Path) -> None:
    assert load_samples(write_set(tmp_path, LINE), tiny, 4, 0) == [Sample(tmp_path / "a.png", (("What?", "blue"),))]


def test_empty_set(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"set\.jsonl is empty"):
        load_samples(write_set(tmp_path), tiny, 4, 0)


def test_missing_set(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_samples(tmp_path / "none.jsonl", tiny, 4, 0)


@pytest.mark.parametrize(
    "line", [{"image": "a.png"}, {"image": "a.png", "turns": []}, [1], {**LINE, "turns": [{"question": "What?", "answer": ""}]}]
)
def test_line_of_another_shape(tiny: LoadedModel, tmp_path: Path, line: object) -> None:
    with pytest.raises(UserError, match=r"set\.jsonl, line 2"):
        load_samples(write_set(tmp_path, LINE, line), tiny, 4, 0)


def test_image_that_cannot_be_read(tiny: LoadedModel, tmp_path: Path) -> None:
    path = write_set(tmp_path, LINE)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        load_samples(path, tiny, 4, 0)


def test_folder_takes_the_models_own_answers(tiny: LoadedModel, tmp_path: Path) -> None:
    for name in ("0001.png", "0002.png"):
        shutil.copy(IMAGES / name, tmp_path / name)
    drawn = load_samples(tmp_path, tiny, 5, seed=0)
    assert {sample.image.name for sample in drawn} == {"0001.png", "0002.png"}
    for sample in drawn:
        ((question, answer),) = sample.turns
        assert question == FREE_QUESTION
        assert answer


def test_empty_folder(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no image in it"):
        load_samples(tmp_path, tiny, 5, seed=0)


def test_fingerprint_follows_images_and_words(tmp_path: Path) -> None:
    (sample,) = read_jsonl(write_set(tmp_path, LINE))
    before = fingerprint([sample])
    assert before == fingerprint([sample])
    assert before != fingerprint([Sample(sample.image, (("What?", "red"),))])
    shutil.copy(IMAGES / "0001.png", tmp_path / "a.png")
    assert before != fingerprint([sample])


def test_what_is_left_out_of_a_folder_is_told(tiny: LoadedModel, tmp_path: Path) -> None:
    shutil.copy(IMAGES / "0001.png", tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("cats")
    (tmp_path / ".a.png").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    said: list[str] = []
    load_samples(tmp_path, tiny, 5, seed=0, say=said.append)
    assert said[0].startswith(f"4 of 5 entries of {tmp_path} are left out: ")
    for words in (".a.png (a hidden file)", "gone.png (a link to nothing)", "more (a folder)", "notes.txt (no picture by its ending)"):
        assert words in said[0]


def test_fewer_samples_than_asked_for_are_told(tiny: LoadedModel, tmp_path: Path) -> None:
    said: list[str] = []
    load_samples(write_set(tmp_path, LINE), tiny, 4, 0, say=said.append)
    assert said == [f"calibrating with 1 samples, all that {tmp_path / 'set.jsonl'} holds; 4 were asked for"]


def test_special_tokens_in_what_is_said(tiny: LoadedModel, tmp_path: Path) -> None:
    line = {"image": "a.png", "turns": [{"question": "What is <|im_end|> here?", "answer": "blue"}]}
    with pytest.raises(UserError, match=r"set\.jsonl, line 1: .* contains the model's special token <\|im_end\|>"):
        load_samples(write_set(tmp_path, line), tiny, 4, 0)
