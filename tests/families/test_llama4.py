"""Llama 4's tiles, and settings of the model that llama.cpp does not support. Takes two seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import capture_encoded
from mbq_gguf.errors import UserError
from mbq_gguf.export.llama4 import check_settings
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.llama4 import canvas, image_processor, inner_size
from mbq_gguf.quantise_tower import TowerSettings, quantise_tower
from PIL import Image
from recipe import write
from recipes import RECIPES
from transformers import AutoConfig


@pytest.mark.parametrize(
    ("size", "side", "tiles", "inner"),
    [
        ((300, 200), 224, (1, 2), (300, 200)),  # the smallest of those that it fits into
        ((30, 20), 64, (1, 1), (64, 42)),  # enlarged to one tile
        ((64, 64), 64, (1, 1), (64, 64)),
        ((130, 60), 64, (1, 3), (130, 60)),
        ((3000, 3000), 336, (4, 4), (1344, 1344)),  # larger than 16 tiles: as many as possible
        ((40, 1100), 64, (16, 1), (37, 1024)),
        ((100, 100), 64, (2, 2), (100, 100)),  # as large as it is, and padded
    ],
)
def test_a_picture_gets_the_canvas_that_it_has_in_transformers(
    size: tuple[int, int], side: int, tiles: tuple[int, int], inner: tuple[int, int]
) -> None:
    """Of 6098 sizes every one had both (docs/log.md, 2026-11-29); that class wants torchvision, so here are some."""
    assert canvas(size[1], size[0], side) == tiles
    assert inner_size(size, (tiles[1] * side, tiles[0] * side), side) == inner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(RECIPES["Llama 4"], tmp_path_factory.mktemp("llama4") / "checkpoint")


def test_tiles_come_row_by_row_and_the_whole_last(checkpoint: Path) -> None:
    picture = Image.new("RGB", (128, 192))
    for row in range(3):
        for column in range(2):
            picture.paste((40 * (2 * row + column), 0, 255), (64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
    found = image_processor(checkpoint)([picture])
    assert found["grid"] == (3, 2)
    assert found["pixel_values"].shape == (7, 3, 64, 64)
    reds = (found["pixel_values"][:, 0].mean(dim=(1, 2)) + 1) / 2 * 255
    assert reds.round().tolist() == [0, 40, 80, 120, 160, 200, 100]
    assert (found["pixel_values"][:, 2] == 1).all()


def test_a_calibrated_tower_has_the_products_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    """Block after block by GPTQ, whose inputs have a name of their own in this family: nearer than rounding to nearest."""
    path = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 100).convert("RGB").save(path)
    plain, moved = features(load(checkpoint), path), []
    for samples in ([], [Sample(path, (("What?", "This."),))]):
        loaded = load(checkpoint)
        quantise_tower(loaded, TowerSettings("W4A8", rotate=False), samples)
        moved.append(float((features(loaded, path) - plain).norm() / plain.norm()))
    print(moved)
    assert moved[1] < 0.9 * moved[0]


def features(loaded: LoadedModel, picture: Path) -> torch.Tensor:
    stream = capture_encoded(loaded, loaded.encode(picture, [("What?", "")]))
    return stream.hidden[0, stream.vision]


@pytest.mark.parametrize("settings", [{"max_patches": 4}, {"resize_to_max_canvas": True}], ids=str)
def test_other_canvases_are_refused(checkpoint: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    name = "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(json.loads((checkpoint / name).read_text()) | settings))
    with pytest.raises(UserError, match="into 16 tiles or fewer"):
        image_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention_chunk_size": 4096}, "attention_chunk_size"),
        ({"floor_scale": 1024}, "floor_scale"),
        ({"attn_temperature_tuning": False}, "attn_temperature_tuning"),
        ({"no_rope_layers": [1, 1, 0, 1, 1, 0, 1, 1]}, "no_rope_layers"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"num_local_experts": 128}, "use_qk_norm"),
        ({"moe_layers": [0, 1]}, "moe_layers"),
        ({"attention_bias": True}, "attention_bias"),
    ],
    ids=str,
)
def test_settings_that_the_runtime_has_otherwise_are_refused(changes: dict[str, Any], name: str) -> None:
    """Those of Scout and Maverick are not: 16 and 128 experts, in every layer and in every second one."""
    scout: dict[str, Any] = AutoConfig.for_model("llama4_text", num_hidden_layers=8).to_dict()
    check_settings(scout)
    check_settings({"num_hidden_layers": 8, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False})
    with pytest.raises(UserError, match=f"llama.cpp assumes {name} "):
        check_settings(scout | changes)
