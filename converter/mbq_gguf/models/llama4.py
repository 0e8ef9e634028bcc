"""Llama 4's image processor: the tiles of a canvas that the picture fits into, then, if there are several, the whole picture.

It computes the same as transformers' Llama4ImageProcessor, which needs torchvision, and the patched llama.cpp (mtmd-mbq-llama4-impl.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import PREPROCESSORS, read_json_object

ARCHITECTURE = "Llama4ForConditionalGeneration"
TILES = 16  # maximum per canvas, as in llama.cpp


@dataclass
class ImageProcessor:
    """Makes tiles of ``side`` by ``side`` pixels, normalised with ``mean`` and ``std`` per channel."""

    side: int
    mean: Sequence[float] = field(default=(0.5, 0.5, 0.5))
    std: Sequence[float] = field(default=(0.5, 0.5, 0.5))

    def __call__(self, images: Sequence[Image.Image], **_: object) -> dict[str, Any]:
        """``pixel_values`` [tiles and whole picture, 3, side, side] of one picture, and ``grid``, the rows and columns of tiles."""
        picture = images[0].convert("RGB")
        rows, columns = canvas(picture.height, picture.width, self.side)
        padded = Image.new("RGB", (columns * self.side, rows * self.side))
        padded.paste(picture.resize(inner_size(picture.size, padded.size, self.side), Image.Resampling.BILINEAR))
        corners = [(column * self.side, row * self.side) for row in range(rows) for column in range(columns)]
        tiles = [padded.crop((x, y, x + self.side, y + self.side)) for x, y in corners]
        if len(tiles) > 1:
            tiles.append(picture.resize((self.side, self.side), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return {"pixel_values": (pixels - mean) / std, "grid": (rows, columns)}


def add_image_outputs(model: Any) -> None:
    """Work around transformers 5.24, whose whole model raises because its language model's output has no ``image_outputs``."""

    def hook(_module: object, _args: object, out: Any) -> None:
        if not hasattr(out, "image_outputs"):
            out.image_outputs = None

    model.language_model.register_forward_hook(hook)


def canvas(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of tiles: the canvas that enlarges the picture least, or if none is large enough, that shrinks it least.

    Ties go to the smallest area. Scales are compared in float32, as in transformers; canvases of the same scale and area are the same.
    """
    grids = [(rows, columns) for rows in range(1, TILES + 1) for columns in range(1, TILES // rows + 1)]
    by_scale: dict[float, list[tuple[int, int]]] = {}
    for rows, columns in grids:
        across, down = np.float32(columns * side) / np.float32(width), np.float32(rows * side) / np.float32(height)
        by_scale.setdefault(float(min(across, down)), []).append((rows, columns))
    large = [scale for scale in by_scale if scale >= 1]
    return min(by_scale[min(large) if large else max(by_scale)], key=math.prod)


def inner_size(size: tuple[int, int], most: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture of ``size`` on a canvas of size ``most``; it is not enlarged beyond one tile."""
    width, height = (min(max(edge, side), limit) for edge, limit in zip(size, most, strict=True))
    across, down = width / size[0], height / size[1]
    if across < down:
        return width, max(min(math.floor(size[1] * across), height), 1)
    return max(min(math.floor(size[0] * down), width), 1), height


def image_processor(model_dir: Path) -> ImageProcessor:
    """The processor with the settings of ``model_dir``. Raises UserError if llama.cpp does not support them."""
    settings = next(read_json_object(model_dir / name) for name in PREPROCESSORS if (model_dir / name).is_file())
    settings = settings.get("image_processor", settings)
    side = settings.get("size", {}).get("height", 336)
    if settings.get("max_patches", TILES) != TILES or settings.get("resize_to_max_canvas"):
        raise UserError(f"llama.cpp cuts Llama 4's pictures into {TILES} tiles or fewer, as few as it can: use a model that does the same")
    return ImageProcessor(side, settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3))
