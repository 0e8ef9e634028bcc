"""The number of tokens of a picture: the vision file's settings, and llama.cpp agrees with transformers at any size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_cbind.vision import EncodedImage
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.export.picture_size import LEAST, MOST, area_limits
from mbq_gguf.llama_cpp.server import LlamaServer
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

FACTOR = 28  # pixels a side of a token
WIDTH = 128  # of the tiny VLM's embeddings
# Sizes at which halves, floats or nothing in particular decide, and what cameras and screens make.
SIDES = [29, 31, 38, 42, 43, 56, 61, 70, 126, 182, 224, 238, 270, 640, 803, 910]
SIZES = [(a, b) for a in SIDES for b in SIDES] + [(1080, 270), (2310, 373), (1849, 518), (1080, 1920), (3024, 4032), (5000, 40)]


@pytest.fixture(scope="module")
def text(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "tiny.gguf"
    common = {"replaced": {}, "base_type": "BF16", "embedding_type": "BF16", "metadata": {}, "file_type": None}
    write_text_gguf(tiny_dir, out, quantised={}, **common)
    return out


def vision_file(tiny_dir: Path, folder: Path, changes: dict[str, object]) -> Path:
    """The mmproj file of the tiny VLM with another preprocessor_config.json."""
    model = Path(shutil.copytree(tiny_dir, folder / "model"))
    file = model / "preprocessor_config.json"
    config = json.loads(file.read_text())
    for name in ("min_pixels", "max_pixels"):
        del config[name]
    file.write_text(json.dumps(config | changes))
    out = folder / "mmproj.gguf"
    write_mmproj_gguf(model, out, mmproj_type="F16")
    return out


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({"min_pixels": 50176, "max_pixels": 50176}, 50176, 50176),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, 3136, 12845056),  # as Qwen2.5-VL is saved today
        ({}, 3136, 1003520),  # the class's own
    ],
)
def test_tokens_of_a_picture_are_as_many_as_transformers_counts(
    changes: dict[str, object], least: int, most: int, text: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    mmproj = vision_file(tiny_dir, tmp_path, changes)
    written = read_header(mmproj).metadata
    assert (written[LEAST], written[MOST]) == (least, most)
    with Model(text, mmproj, threads=2, context=512) as model:
        for height, width in SIZES:
            h, w = smart_resize(height, width, FACTOR, least, most)
            count = h * w // FACTOR**2
            # chunks() refuses an embedding of another number of tokens than llama.cpp gives a picture of that size
            picture = EncodedImage(width, height, (np.zeros((count, WIDTH), np.float32),))
            with model.vision.chunks(model.vision.marker + "x", [picture]) as chunks:
                assert sum(chunk.length for chunk in chunks if chunk.embedding is not None) == count


def test_the_server_sees_the_same_size(text: Path, tiny_dir: Path, tmp_path: Path) -> None:
    mmproj = vision_file(tiny_dir, tmp_path, {"min_pixels": 50176, "max_pixels": 50176})
    with LlamaServer(text, mmproj, threads=2, ctx=512) as server:
        counts = []
        for side in (224, 640, 56):
            Image.new("RGB", (side, side)).save(tmp_path / "grey.png")
            counts.append(server.ask(tmp_path / "grey.png", "What?", 1).prompt_tokens)
    assert counts[0] == counts[1] == counts[2] > 64


def test_limits_of_other_families(tiny_dir: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(str(tiny_dir), backend="pil")
    assert isinstance(processor, Qwen2VLImageProcessorPil)
    assert area_limits(processor) == (50176, 50176)
    # GLM-4V bounds frames times area, and doubles a picture to two frames: 112 x 112 at least are 6272 of a picture.
    assert area_limits(Glm4vImageProcessorPil()) == (6272, Glm4vImageProcessorPil.size["longest_edge"] // 2)
    assert area_limits(LlavaNextImageProcessorPil()) == (None, None)  # edges, not areas
