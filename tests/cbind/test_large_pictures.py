"""Several threads convert the pixels of a single large picture; each of several pictures has one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mbq_cbind.model import Model
from PIL import Image

SIDE = 448  # 200 704 pixels: beyond the 131 072 from which on four threads share them


def test_a_large_picture_alone_is_what_it_is_among_others(static_file: Any, large_mmproj: Path, tmp_path: Path) -> None:
    """Bit for bit, noise without two equal parts, so that pixels in another place would show."""
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    with Model(static_file({}), large_mmproj, context=1024, threads=1) as model:
        alone = [model.vision.encode(path) for path in paths]
        passes = model.vision.passes
        together = model.vision.encode_together(paths)
        assert model.vision.passes == passes + 1
    for one, among in zip(alone, together, strict=True):
        assert np.array_equal(np.concatenate(one.embeddings), np.concatenate(among.embeddings))
    assert not np.array_equal(np.concatenate(alone[0].embeddings), np.concatenate(alone[1].embeddings))
