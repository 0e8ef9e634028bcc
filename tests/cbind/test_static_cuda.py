"""W4A8 on the CPU against CUDA, dynamic and with static ranges: products with equal bits, answers of a whole model within 1e-4 nats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_cbind.mul_mat import mul_mat
from mbq_gguf.evaluate.kld import divergence
from mbq_gguf.formats.gguf_types import import_gguf
from static_files import WORDS, keys, picture

LIMIT = 1e-4  # nats, mean over an answer's tokens
CUTTING = {"text": 0.5, "vision": 1.0}  # ranges that cut, so that a device which overlooks them gives other answers


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_products_of_a_file_are_equal(static: bool, static_file: Any) -> None:
    reader = import_gguf().GGUFReader(static_file({}))
    random = np.random.default_rng(0)
    weights = [tensor for tensor in reader.tensors if tensor.tensor_type.name in ("Q4_0", "Q8_0") and "blk.1." in tensor.name]
    assert len(weights) == 7
    for tensor in weights:
        columns = int(tensor.shape[0])
        x = random.normal(size=(70, columns)).astype(np.float32)
        ranges = np.resize(np.array([0.0, *CUTTING.values()], np.float32), 70) if static else None
        found = [
            mul_mat(tensor.tensor_type.name, tensor.data, columns, x, device=device, row_scale=True, ranges=ranges)
            for device in ("CPU", "CUDA0")
        ]
        assert np.array_equal(found[0], found[1]), tensor.name


@pytest.mark.gpu
def test_answers_are_close(static_file: Any, large_mmproj: Path, tmp_path: Path) -> None:
    """Text and a picture, the same encoded one; what the ranges change is far more than what the devices differ by."""
    found: dict[tuple[bool, str], Any] = {}
    image: Any = None
    for static in (False, True):
        path = static_file(keys(*CUTTING.values(), positions=[0]) if static else {})
        for device, layers in (("cpu", 0), ("cuda", -1)):
            with Model(path, large_mmproj, context=1024, gpu_layers=layers) as model:
                image = image or model.vision.encode(picture(tmp_path, 448))
                answer = model.tokenize(" It is the quick brown fox that jumps over the lazy dog.")
                found[static, device] = model.logits(model.prompt("What is " + WORDS), [image], answer)
    for static in (False, True):
        assert divergence(found[static, "cpu"], found[static, "cuda"]).mean() < LIMIT
    assert divergence(found[False, "cpu"], found[True, "cpu"]).mean() > 10 * LIMIT
