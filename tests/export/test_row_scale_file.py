"""A file with one scale per row: its metadata, how llama.cpp runs it, and what llama.cpp refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_header import Header, read_header
from mbq_gguf.formats import row_scale
from nearest_files import write_nearest

KINDS = pytest.mark.parametrize("kind", list(row_scale.ROW_SCALES))
PROMPT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(autouse=True)
def _built(built_llama: Path) -> None:
    """Everything here needs the built libraries."""


def write(tiny_dir: Path, out: Path, kind: str) -> Header:
    return read_header(write_nearest(tiny_dir, out, kind))


def logits(path: Path) -> np.ndarray:
    with Model(path, context=128) as model:
        return model.logits(PROMPT, [], model.tokenize(" and"))[0]


@KINDS
def test_the_file_names_its_tensors_and_their_rows_repeat_a_scale(kind: str, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    header = write(tiny_dir, path, kind)
    of = row_scale.ROW_SCALES[kind]
    tensors = {tensor.name: tensor for tensor in header.tensors if tensor.type_name == of.stored}
    assert header.metadata["mbq.row_scale.version"] == 1
    assert header.lengths["mbq.row_scale"] == len(tensors) == 7 * 3
    for name in header.metadata["mbq.row_scale"]:  # type: ignore[union-attr]
        tensor = tensors[str(name)]
        start = header.data_start + tensor.offset
        blocks = np.memmap(path, np.uint8, "r", start, (tensor.shape[1], tensor.shape[0] // 32, of.type_size))
        assert np.all(blocks[:, :, :2] == blocks[:, :1, :2])


@KINDS
def test_llama_cpp_takes_the_other_product(kind: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its key the file runs by other sums than without, and gives nearly the same: both round activations to 8 bits."""
    write(tiny_dir, tmp_path / "flagged.gguf", kind)
    monkeypatch.setattr(row_scale, "metadata", lambda tensors: {})
    write(tiny_dir, tmp_path / "plain.gguf", kind)
    flagged, plain = logits(tmp_path / "flagged.gguf"), logits(tmp_path / "plain.gguf")
    assert not np.array_equal(flagged, plain)
    assert np.abs(flagged - plain).max() < 0.1 * np.ptp(plain)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mbq.row_scale": ["blk.0.attn_x.weight"]}, "holds no such tensor"),
        ({"mbq.row_scale": ["blk.0.attn_norm.weight"]}, "must be Q4_0 or Q8_0 and is f32"),
        ({"mbq.row_scale": "blk.0.attn_q.weight"}, "must be an array of strings"),
        ({"mbq.row_scale": [1, 2]}, "must be an array of strings"),
        ({"mbq.row_scale.version": 2}, "is 2: this program knows 1"),
        ({"mbq.row_scale.version": "1"}, "must be a u32"),
    ],
)
def test_wrong_keys_are_refused(
    changed: dict[str, Any], sentence: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**row_scale.metadata(["blk.0.attn_q.weight"]), **changed}
    monkeypatch.setattr(row_scale, "metadata", lambda tensors: keys)
    write(tiny_dir, tmp_path / "tiny.gguf", "W4A8")
    with pytest.raises(BindingError, match=sentence):
        Model(tmp_path / "tiny.gguf")
