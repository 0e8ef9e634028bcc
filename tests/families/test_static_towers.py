"""Static ranges in every family's tower: the converter finds one for each activation of a block, and each product of the graph uses its
own.

A range of 1e30 makes a product's activations 0, so a tower with such ranges at one site gives, bit for bit, what matrices of 0 there give.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mbq_cbind.model import Model
from mbq_cbind.vision import Vision
from mbq_gguf.calibration.tower_ranges import COARSER
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.static_ranges import SITES
from mbq_gguf.models import load
from mbq_gguf.models.towers import find_tower
from mbq_gguf.quantise_tower import TowerSettings, quantise_tower
from small import Small
from static_files import with_keys

READERS = {"qkv": "attn_(q|k|v|qkv)", "o": "attn_out", "gate_up": "ffn_(gate|up)", "down": "ffn_down"}
HUGE = 1e30


def test_every_product_takes_the_range_of_its_site(small: Small, tmp_path: Path) -> None:
    loaded = load(small.directory)
    result = quantise_tower(loaded, TowerSettings("W8A8", rotate=False, activations="static", estimator="minmax"), small.samples[:1])
    tower = find_tower(loaded)
    assert tower
    keys = {name: value for name, value in result.metadata.items() if name.startswith("mbq.act.")}
    assert all(len(keys[f"mbq.act.range.{site}.vision"]) == len(tower.blocks) for site in SITES)
    others = {name: value for name, value in result.metadata.items() if name not in keys}
    path = tmp_path / "plain.gguf"
    write_mmproj_gguf(small.directory, path, mmproj_type="W8A8", quantised=result.quantised, replaced=result.replaced, metadata=others)
    write_mmproj_gguf(small.directory, tmp_path / "F16.gguf", mmproj_type="F16")
    plain = path.read_bytes()
    with Model(small.written("towers")[0], context=64, threads=1) as model:
        features = seen_by(model, small.picture, tmp_path)
        exact, dynamic, static = map(features, ((tmp_path / "F16.gguf").read_bytes(), plain, with_keys(plain, keys)))
        own, shared = (float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) for found in (dynamic, static))
        left = sum(keys[f"mbq.act.range.{site}.vision"].count(0.0) for site in SITES)
        print(f"features moved by {own:.4f} and {shared:.4f}, {left} of {4 * len(tower.blocks)} dynamic")
        assert 0.5 * own < shared < COARSER * own
        for site, readers in READERS.items():
            ranges = {"mbq.act.version": 1, f"mbq.act.range.{site}.vision": [HUGE] * len(tower.blocks)}
            gone = features(with_keys(plain, ranges))
            assert np.array_equal(gone, features(without(path, readers))), site
            assert not np.array_equal(gone, dynamic), site


def seen_by(model: Model, picture: Path, folder: Path) -> Callable[[bytes], np.ndarray]:
    """What a vision file gives of the picture."""

    def features(mmproj: bytes) -> np.ndarray:
        path = folder / "mmproj.gguf"
        path.write_bytes(mmproj)
        vision = Vision(path, model._model, threads=1, use_gpu=False)
        try:
            return np.concatenate(vision.encode(picture).embeddings)
        finally:
            vision.close()

    return features


def without(path: Path, readers: str) -> bytes:
    """The file with these matrices of every block 0."""
    data, gguf = bytearray(path.read_bytes()), import_gguf()
    for tensor in gguf.GGUFReader(path).tensors:
        if re.fullmatch(rf"v\.blk\.\d+\.{readers}\.weight", tensor.name):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
            data[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(int(tensor.n_bytes))
    return bytes(data)
