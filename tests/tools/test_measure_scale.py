"""tools/random_model.py and tools/measure_scale.py: a model with given shapes in shards, and the cost of generating texts with it."""

from __future__ import annotations

import json
from pathlib import Path

import measure_scale
import pytest
import torch
from mbq_gguf.models import load
from random_model import Shape, write
from safetensors import safe_open

SHAPE = Shape(2, 128, 192, 4, 2, depth=3, tower=32, tower_heads=2, vocabulary=49408)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    write(SHAPE, SHAPE.layers, folder)
    return folder


def test_each_layer_has_a_file_with_the_same_matrices(model: Path) -> None:
    files = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    of_layers = [{file for name, file in files.items() if f"language_model.layers.{number}." in name} for number in range(2)]
    assert [len(found) for found in of_layers] == [1, 1]
    assert of_layers[0] != of_layers[1]
    names = [f"model.language_model.layers.{number}.mlp.up_proj.weight" for number in range(2)]
    first, second = (safe_open(str(model / files[name]), framework="pt").get_tensor(name) for name in names)
    assert torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.02, rel=0.1)
    loaded = load(model)
    assert (len(loaded.decoder.layers), loaded.tied, loaded.decoder.head.out_features) == (2, False, 49408)


def test_texts_of_more_layers_than_there_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbq_gguf.calibration.synthetic.TEXT_TOKENS", 4)
    found = measure_scale.texts(model, 3, "cpu", 1)
    assert found["ended"] == "1 texts of 3 layers"
    assert found["told"].keys() == {"check weights", "load", "write texts"}
    assert found["host_gib"]["anonymous"] >= 0
