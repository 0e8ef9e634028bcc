"""Checks before a conversion that the disks have room for everything it writes, per file system."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.export.conversion import FOREIGN

LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|lm_head)\.weight$")
OTHER_BITS = 16  # bits of matrices of the text file that are not quantised
VECTOR_BITS = 32


@dataclass(frozen=True)
class Need:
    """``size`` bytes in ``folder`` (or its nearest existing parent) for ``what``."""

    folder: Path
    what: str
    size: int


@dataclass(frozen=True)
class Sizes:
    """Bytes that a conversion writes, by part."""

    layers: int
    text: int  # layers, embeddings and the rest
    mmproj: int


def predict(shapes: Mapping[str, Sequence[int]], layer_bits: float, embedding_bits: float, mmproj_bits: float) -> Sizes:
    """Predict the sizes of the two files from the checkpoint's ``shapes``, by tensor name, and bits per weight."""
    layers = others = mmproj = 0.0
    for name, shape in shapes.items():
        foreign, vector = FOREIGN.search(name) is not None, len(shape) < 2
        bits: float = VECTOR_BITS if vector else OTHER_BITS
        if foreign:
            mmproj += prod(shape) * (bits if vector else mmproj_bits)
        elif LAYER.search(name) and not vector:
            layers += prod(shape) * layer_bits
        else:
            others += prod(shape) * (embedding_bits if EMBEDDING.search(name) else bits)
    return Sizes(int(layers / 8), int((layers + others) / 8), int(mmproj / 8))


def check_room(needs: Iterable[Need]) -> None:
    """Raise UserError, which says what is needed, for what, if, and what is free, where a file system has too little."""
    by_device: dict[int, list[tuple[Path, Need]]] = defaultdict(list)
    for need in needs:
        there = next(folder for folder in (need.folder, *need.folder.parents) if folder.is_dir())
        by_device[os.stat(there).st_dev].append((there, need))
    for found in by_device.values():
        folder, total = found[0][0], sum(need.size for _, need in found)
        free = shutil.disk_usage(folder).free
        if total > free:
            parts = ", ".join(f"{need.what} {need.size / 1e6:.1f} MB" for _, need in found)
            raise UserError(
                f"{folder} has {free / 1e6:.1f} MB free and {total / 1e6:.1f} MB are needed ({parts}): "
                "free some space there, or choose another place"
            )


def taken(folder: Path) -> int:
    """Bytes of the finished layers below ``folder``, 0 if there are none."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.is_file())
