"""A small VLM with random weights as GGUF files: its answers are nonsense, but it takes the same path as any model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf


class Pair(NamedTuple):
    model: Path
    mmproj: Path


def write_pair(source: Path, folder: Path) -> Pair:
    """The Hugging Face model in `source` as model.gguf and mmproj-model.gguf in `folder`, all in BF16."""
    pair = Pair(folder / "model.gguf", folder / "mmproj-model.gguf")
    write_text_gguf(source, pair.model, quantised={}, replaced={}, base_type="BF16", embedding_type="BF16", metadata={}, file_type=None)
    write_mmproj_gguf(source, pair.mmproj, mmproj_type="BF16")
    return pair
