"""What preflight checks refuse before a weight is read: settings, sets and pictures."""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mbq_gguf.calibration.dataset import SHIPPED
from mbq_gguf.cli import main
from mbq_gguf.convert import ConvertOptions
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel
from mbq_gguf.preflight import Preflight, run_preflight
from PIL import Image

LOADING = importlib.import_module("mbq_gguf.models.load")  # the package gives its function this name
PICTURE = SHIPPED.parent / "images" / "0000.png"


@pytest.fixture(autouse=True)
def _no_weights(built_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        pytest.fail("the weights were read first")

    monkeypatch.setattr(LOADING, "_load_weights", read)


def ahead(model: Path, out: Path, **options: Any) -> Preflight:
    return run_preflight(ConvertOptions(model, out, **options), lambda _: None)


def write_set(path: Path, image: object = PICTURE, question: str = "What?", answer: str = "blue") -> Path:
    path.write_text("\n" + json.dumps({"image": str(image), "turns": [{"question": question, "answer": answer}]}))
    return path


def bomb(path: Path) -> None:
    """A PNG that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(3751))) + chunk(b"IEND", b""))


PICTURES = {
    "one side over 200 times the other": lambda path: Image.new("RGB", (3000, 10)).save(path),
    "too many pixels": bomb,
    "truncated": lambda path: path.write_bytes(PICTURE.read_bytes()[:400]),
    "not a picture of a known format": lambda path: path.write_bytes(b"hello"),
}


@pytest.mark.parametrize("words", PICTURES)
def test_a_picture_is_named_with_its_line(words: str, tiny_dir: Path, tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    PICTURES[words](image)
    with pytest.raises(UserError, match=rf"set\.jsonl, line 2: the image {image} cannot be read \(.*{words}"):
        ahead(tiny_dir, tmp_path / "out.gguf", calib=write_set(tmp_path / "set.jsonl", image))
    (tmp_path / "set.jsonl").unlink()
    with pytest.raises(UserError, match=f"the image {image} cannot be read"):
        ahead(tiny_dir, tmp_path / "out.gguf", calib=tmp_path)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("I;16", "png"), ("L", "webp"), ("1", "gif")])
def test_pictures_of_any_kind_pass(mode: str, suffix: str, tiny_dir: Path, tmp_path: Path) -> None:
    Image.new(mode, (1, 1)).save(tmp_path / f"a.{suffix}")
    found = ahead(tiny_dir, tmp_path / "out.gguf", calib=write_set(tmp_path / "set.jsonl", tmp_path / f"a.{suffix}"))
    assert [sample.place for sample in found.drawn.samples] == [f"{tmp_path / 'set.jsonl'}, line 2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_bpw": 1.5}, "give a larger --target-bpw"),
        ({"learn_scales": 2, "propagate_error": False}, "give --learn-scales with --propagate-error"),
        ({"calib": Path("nowhere")}, "the calibration set nowhere does not exist"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(options: dict[str, Any], words: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        ahead(tiny_dir, tmp_path / "out.gguf", **options)


def test_a_work_directory_of_others(tiny_dir: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and not a work directory"):
        ahead(tiny_dir, tmp_path / "out.gguf", work_dir=work, samples=1)
    (work / "fingerprint.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(UserError, match="differs in its model and settings and code"):
        ahead(tiny_dir, tmp_path / "out.gguf", work_dir=work, samples=1)


def test_prompts_are_those_of_the_loaded_model(tiny_dir: Path, tiny: LoadedModel) -> None:
    found = LOADING.load_meta(tiny_dir).prompts
    assert found.end_ids == tiny.prompts.end_ids
    turns = [("What?", "blue"), ("Where?", "left")]
    encoded, expected = found.encode(PICTURE, turns), tiny.prompts.encode(PICTURE, turns)
    assert torch.equal(encoded.ids, expected.ids)
    assert torch.equal(encoded.answer, expected.answer)


def test_imatrix_looks_ahead_too(tiny_dir: Path, tmp_path: Path) -> None:
    call = ["imatrix", str(tiny_dir), str(tmp_path / "i.gguf"), "--calib", str(write_set(tmp_path / "set.jsonl", question="<|image_pad|>"))]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'set.jsonl'}, line 2: '<|image_pad|>' contains the model's special token")
    assert not (tmp_path / "i.gguf").exists()
