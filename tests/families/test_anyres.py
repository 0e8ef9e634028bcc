"""Pictures tiled at the best of a model's resolutions (LLaVA-NeXT, LLaVA-OneVision), several pictures, and many sizes.

Costs about four seconds of processor time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mbq_gguf.models.pictures import anyres
from PIL import Image
from small import Small, moved
from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor

FEATURES = 0.005  # as in test_every_family.py
SIZES = [(draw.randrange(8, 1200), draw.randrange(8, 1200)) for draw in [random.Random(0)] for _ in range(300)]


@pytest.fixture(scope="module", params=["LLaVA-NeXT", "LLaVA-OneVision"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(request.param, tmp_path_factory.mktemp("anyres"))


@pytest.fixture(scope="module")
def runtime(either: Small) -> Iterator[Model]:
    exact = either.folder / "mmproj-exact.gguf"
    write_mmproj_gguf(either.directory, exact, mmproj_type="F32")
    with Model(either.written("bf16")[0], exact, context=512, threads=1) as model:
        yield model


def counted(config: Any, width: int, height: int) -> int:
    (count,) = anyres({"image_sizes": [[height, width]]}, None, config)
    assert isinstance(count, int)
    return count


def test_pictures_of_any_size_take_as_many_tokens_in_llama_cpp(either: Small, runtime: Model) -> None:
    """Shapes at which a float would round an edge otherwise are among them: whole and half patches, one long edge."""
    before = runtime.vision.tokens(64, 64) - counted(either.loaded.config, 64, 64)  # what stands round a picture: nothing
    assert before == 0
    for width, height in [*SIZES, (1920, 1080), (96, 64), (64, 1000), (1000, 9), (640, 480), (333, 222)]:
        assert runtime.vision.tokens(width, height) == counted(either.loaded.config, width, height), (width, height)


def test_they_are_as_many_as_transformers_counts() -> None:
    """With the published models' resolutions, by their processors, which count without a picture."""
    config = LlavaOnevisionConfig()
    fields = {"image_processor": SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints), "num_image_tokens": 27**2}
    fields |= {"vision_aspect_ratio": config.vision_aspect_ratio}
    processor: Any = SimpleNamespace(**fields)
    processor._get_unpadded_features = lambda *args: LlavaOnevisionProcessor._get_unpadded_features(processor, *args)
    for width, height in [*SIZES, (2400, 3000), (5000, 700)]:
        theirs = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, 384, 384)
        assert counted(config, width, height) == theirs, (width, height)


def test_several_pictures_are_what_hugging_face_sees(either: Small, runtime: Model) -> None:
    """OneVision's are then one tile each, in the middle of a square of the mean colour; NeXT's are cut as ever."""
    paths = [either.folder / f"{width}.png" for width in (90, 130)]
    for path, size in zip(paths, ((100, 90), (60, 130)), strict=True):
        Image.fromarray(np.random.default_rng(3).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    processor: Any = either.loaded.prompts.image_prompt
    together = [[Image.open(path) for path in paths]] if either.name == "LLaVA-OneVision" else [Image.open(path) for path in paths]
    inputs = processor.image_processor(images=together, return_tensors="pt")
    with torch.no_grad():
        found = either.loaded.model.model.get_image_features(**inputs)
    for path, theirs in zip(paths, found.pooler_output, strict=True):
        (ours,) = runtime.vision.encode(path, among=len(paths)).embeddings
        assert len(ours) == len(theirs)
        assert moved(ours, theirs.numpy()) <= FEATURES


def test_layers_behind_the_one_that_is_read_are_not_in_the_file(either: Small) -> None:
    layers = either.loaded.config.vision_config.num_hidden_layers
    blocks = {entry.name.split(".")[2] for entry in read_header(either.mmproj).tensors if entry.name.startswith("v.blk.")}
    assert len(blocks) == layers + 1 + either.loaded.config.vision_feature_layer
