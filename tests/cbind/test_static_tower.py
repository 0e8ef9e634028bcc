"""Static ranges in a vision tower: every product of a block uses those of its site, and files with corrupted keys are refused.

A range of 1e30 makes each of a product's activations 0, so a tower with one such range is, bit for bit, a tower whose matrices there are 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.formats.gguf_types import import_gguf
from rich.console import Console
from static_files import picture, with_keys

BLOCKS = 3
HUGE = 1e30
READERS = {"qkv": ("attn_q", "attn_k", "attn_v"), "o": ("attn_out",), "gate_up": ("ffn_up",), "down": ("ffn_down",)}


@pytest.fixture(scope="module", params=["W8A8", "W4A8"])
def files(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertOptions:
    """The tiny VLM with a tower of one scale per row, without ranges."""
    out = tmp_path_factory.mktemp("tower") / "tiny.gguf"
    options = ConvertOptions(tiny_dir, out, type="BF16", mmproj_type=request.param, rounding="nearest")
    convert(options, Console(quiet=True))
    return options


def keys(**ranges: list[float]) -> dict[str, Any]:
    return {"mbq.act.version": 1} | {f"mbq.act.range.{site}.vision": values for site, values in ranges.items()}


def features(files: ConvertOptions, mmproj: bytes, folder: Path, count: int = 1) -> list[np.ndarray]:
    """The embeddings of one picture, or of several that go through the tower together."""
    path, pictures = folder / "mmproj.gguf", [picture(folder, side) for side in (112, 112)][:count]
    path.write_bytes(mmproj)
    with Model(files.out, path, context=256, threads=1) as model:
        found = model.vision.encode_together(pictures) if count > 1 else [model.vision.encode(pictures[0])]
    return [np.concatenate(image.embeddings) for image in found]


def without(path: Path, names: set[str]) -> bytes:
    """The file with these tensors all 0."""
    data, found = bytearray(path.read_bytes()), set()
    for tensor in import_gguf().GGUFReader(path).tensors:
        if tensor.name in names:
            found.add(tensor.name)
            data[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(int(tensor.n_bytes))
    assert found == names
    return bytes(data)


@pytest.mark.parametrize("site", READERS)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_each_product_takes_the_range_of_its_site(site: str, block: int, files: ConvertOptions, tmp_path: Path) -> None:
    plain = files.mmproj.read_bytes()
    ranges = [HUGE if index == block else 0.0 for index in range(BLOCKS)]
    (static,) = features(files, with_keys(plain, keys(**{site: ranges})), tmp_path)
    (zeroed,) = features(files, without(files.mmproj, {f"v.blk.{block}.{name}.weight" for name in READERS[site]}), tmp_path)
    assert np.array_equal(static, zeroed)
    assert not np.array_equal(static, features(files, plain, tmp_path)[0])


def test_without_ranges_it_is_dynamic(files: ConvertOptions, tmp_path: Path) -> None:
    """Ranges of 0, arrays shorter than the tower, keys of other classes, or none at all."""
    plain = files.mmproj.read_bytes()
    other = {"mbq.act.version": 1, "mbq.act.range.qkv.text": [HUGE] * BLOCKS}
    for metadata in (keys(qkv=[0.0] * BLOCKS, down=[0.0]), other, {"mbq.act.range.qkv.vision": [HUGE] * BLOCKS}):
        assert np.array_equal(features(files, with_keys(plain, metadata), tmp_path)[0], features(files, plain, tmp_path)[0])


def test_pictures_together_have_the_same_ranges(files: ConvertOptions, tmp_path: Path) -> None:
    data = with_keys(files.mmproj.read_bytes(), keys(qkv=[1.0] * BLOCKS, o=[0.1] * BLOCKS, down=[0.2] * BLOCKS))
    (alone,), together = features(files, data, tmp_path), features(files, data, tmp_path, 2)
    for found in together:
        assert np.array_equal(found, alone)
    assert not np.array_equal(alone, features(files, files.mmproj.read_bytes(), tmp_path)[0])


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"mbq.act.version": 2}, "mbq.act.version is 2: this program knows 1"),
        ({"mbq.act.version": "1"}, "mbq.act.version must be a u32"),
        (keys(o=[1, 2]), "mbq.act.range.o.vision must be an array of f32"),
        ({"mbq.act.version": 1, "mbq.act.range.o.vision": 1.0}, "mbq.act.range.o.vision must be an array of f32"),
        (keys(down=[1.0] * (BLOCKS + 1)), "mbq.act.range.down.vision has 4 values: the tower has 3 blocks"),
        (keys(qkv=[1.0, -1.0]), "mbq.act.range.qkv.vision is -1 in block 1: it must be 0 or a range from 2.-95 up"),
        (keys(qkv=[float("nan")]), "must be 0 or a range"),
        (keys(gate_up=[float("inf")]), "must be 0 or a range"),
        (keys(gate_up=[1e-30]), "must be 0 or a range"),
    ],
)
def test_spoilt_keys_are_refused(metadata: dict[str, Any], sentence: str, files: ConvertOptions, tmp_path: Path) -> None:
    with pytest.raises(BindingError, match=sentence):
        features(files, with_keys(files.mmproj.read_bytes(), metadata), tmp_path)
