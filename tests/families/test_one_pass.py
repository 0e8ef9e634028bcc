"""Each family's text and pictures in one pass give the logits of separate decodes, or the table of families says that one pass is not
supported. Pictures of one size that share a pass of the tower, or follow one another, give the same results as alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.models.families import family_of
from mbq_gguf.models.support import limits
from PIL import Image
from small import Small

LIMIT = 1e-4  # of max |logit|; measured: 4e-7 at most
# Three pictures are one pass of the tower.
TOGETHER = ("Qwen2-VL", "Qwen2.5-VL", "SmolVLM", "Idefics3", "InternVL 3 (-hf)", "InternVL 2 to 3.5", "InternVL 2 and 2.5 (InternLM2)")
TOGETHER += ("InternVL 2 (Phi-3)", "Gemma 4", "Gemma 4 (experts)", "Gemma 4 (E2B, E4B)")
# M stands for a picture
PROMPTS = ("None at all", "MFirst", "In the M middle", "M then M then at last M")


@pytest.fixture(scope="module")
def models(small: Small) -> Iterator[tuple[Model, Model]]:
    """In turns and in one pass, on the same files in F32."""
    files = small.folder / "f32.gguf", small.folder / "mmproj-f32.gguf"
    common = {"replaced": {}, "base_type": "F32", "embedding_type": "F32", "metadata": {}, "file_type": None}
    write_text_gguf(small.directory, files[0], quantised={}, **common)
    write_mmproj_gguf(small.directory, files[1], mmproj_type="F32")
    turns, once = (Model(*files, context=512, threads=1, aifs=aifs, flash_attention=False) for aifs in (False, True))
    yield turns, once
    turns.close()
    once.close()


def support(small: Small) -> str | None:
    """Why the table of families says that it has none."""
    family = family_of(small.loaded.architecture)
    assert family is not None
    return limits(family)["one pass"]


def test_one_pass_is_the_decode_in_turns(small: Small, models: tuple[Model, Model]) -> None:
    turns, once = models
    assert once.apart == support(small)
    pictures = [small.folder / f"one-pass-{seed}.png" for seed in range(3)]
    for seed, path in enumerate(pictures):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*small.recipe.size[::-1], 3), dtype=np.uint8)).save(path)
    alone = turns.vision.encode(pictures[0])
    passes = turns.vision.passes
    images = [turns.vision.encode(path, len(pictures)) for path in pictures]  # the later ones by the first one's graph
    first = once.vision.encode(pictures[-1], len(pictures))
    assert all(np.array_equal(*pair) for pair in zip(first.embeddings, images[-1].embeddings, strict=True))
    passes = turns.vision.passes - passes  # one for each slice of each picture
    before = turns.vision.passes
    joined = turns.vision.encode_together(pictures)
    assert turns.vision.passes - before == (1 if small.name in TOGETHER else passes)
    for together, apart in zip(joined, images, strict=True):
        assert np.array_equal(np.concatenate(together.embeddings), np.concatenate(apart.embeddings))
    answer = turns.tokenize("seven of the blue circles")
    for words in PROMPTS:
        found = [alone] if words.count("M") == 1 else images[: words.count("M")]
        ours, theirs = (
            model.logits(model.prompt(words, images=0).replace("M", model.vision.marker), found, answer) for model in (once, turns)
        )
        assert float(np.abs(ours - theirs).max() / np.abs(theirs).max()) <= LIMIT
