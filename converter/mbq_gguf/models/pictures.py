"""The tokens that llama.cpp substitutes for a picture in a prompt, by family (libmtmd, tools/mtmd/mtmd.cpp, init_vision).

Calibration must see the same prompt as inference. For some families, transformers' processors write other text around a picture (two
newlines in Gemma 3, one in LLaVA's template), and some need torchvision for videos, which are not supported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mbq_gguf.models import llama4

Piece = str | int  # text, or a number of picture tokens
Counted = Callable[[Mapping[str, Any], Any, Any], list[Piece]]


@dataclass(frozen=True)
class Picture:
    """How a family's prompt represents a picture.

    ``pieces`` computes the prompt's pieces from the image processor's output, the processor and the model's configuration; the processor is
    called with ``options``. ``features``: the processor's outputs that the model takes. ``types``: the argument of the model's forward, if
    any, that marks picture tokens with 1 [1, tokens]. ``inside``: texts whose tokens come from the vision file at run time. ``prepare``:
    preprocesses the picture as llama.cpp does, if transformers differs. ``processor``: makes the image processor from a model's directory,
    if it is not transformers' own.
    """

    pieces: Counted
    features: tuple[str, ...] = ("pixel_values",)
    types: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    prepare: Callable[[Image.Image], Image.Image] | None = None
    processor: Callable[[Path], Any] | None = None


def grid(before: str, after: str) -> Counted:
    """Patches of a picture of any size, merged in squares (Qwen and GLM)."""

    def pieces(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
        return [before, int(features["image_grid_thw"][0].prod()) // processor.merge_size**2, after]

    return pieces


def fixed(before: str, name: str, after: str) -> Counted:
    """A fixed number of tokens per picture, which is setting ``name`` of the configuration."""
    return lambda features, processor, config: [before, int(getattr(config, name)), after]


def tiles(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Tiles row by row, each with its position, then the whole picture (Idefics3, SmolVLM)."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    pieces: list[Piece] = []
    for row in range(1, features["rows"][0][0] + 1):
        pieces += ["\n"] if row > 1 else []
        for column in range(1, features["cols"][0][0] + 1):
            pieces += [f"<fake_token_around_image><row_{row}_col_{column}>", count]
    return [*pieces, "\n\n", "<fake_token_around_image><global-img>", count, "<fake_token_around_image>"]


def crops(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Tiles and the whole picture in a row (InternVL)."""
    return ["<img>", int(features["num_patches"][0]) * config.image_seq_length, "</img>"]


def slices(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """The whole picture, then its slices, row by row (MiniCPM-V)."""
    return _sliced(
        (features["target_sizes"].prod(-1) // (4 if processor.downsample_mode == "4x" else 16)).tolist(), features["grids"][0][1]
    )


def resampled(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Like :func:`slices`, with as many tokens for each as the resampler has queries (MiniCPM-V up to 4.5)."""
    return _sliced([config.query_num] * len(features["target_sizes"]), features["grids"][0][1])


def _sliced(counts: list[int], columns: int) -> list[Piece]:
    first, *others = counts
    pieces: list[Piece] = ["<image>", first, "</image>"]
    for number, count in enumerate(others):
        pieces += ["\n"] if number and number % columns == 0 else []
        pieces += ["<slice>", count, "</slice>"]
    return pieces


def rows(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Rows of patches with a token between them (Pixtral)."""
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = (int(size) // side for size in features["image_sizes"][0])
    return [*[width, "[IMG_BREAK]"] * (height - 1), width, "[IMG_END]"]


def anyres(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """The whole picture, then the rows of its tiles' patches, each with a newline, without padding and downscaled (LLaVA-NeXT, OneVision).

    Counts as transformers does, whose processors need torchvision.
    """
    from transformers.image_processing_utils import select_best_resolution

    size = [int(edge) for edge in features["image_sizes"][0]]
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    edges = [side * (edge // vision.image_size) for edge in select_best_resolution(size, config.image_grid_pinpoints)]
    across = int(size[1] / size[0] > edges[1] / edges[0])  # the dimension that the picture fills
    filled = int(round(size[1 - across] * (edges[across] / size[across]), 7))
    edges[1 - across] -= 2 * ((edges[1 - across] - filled) // 2)
    most = getattr(config, "vision_aspect_ratio", None)  # OneVision: at most the tokens of this many tiles
    ratio = math.sqrt(edges[0] * edges[1] / (most_tiles(most) * side**2)) if most else 0
    rows, columns = (int(edge // ratio) for edge in edges) if ratio > 1.1 else edges
    return [side**2 + rows * (columns + 1)]


def most_tiles(aspect_ratio: str) -> int:
    """The number in OneVision's ``vision_aspect_ratio`` (``anyres_max_9``). Raises ValueError if there is none."""
    return int(aspect_ratio.removeprefix("anyres_max_"))


def tiled(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Tiles row by row, if there are several, then the whole picture (Llama 4)."""
    vision = config.vision_config
    count = round((vision.image_size // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)
    rows, columns = features["grid"]
    row: list[Piece] = [count, *["<|tile_x_separator|>", count] * (columns - 1), "<|tile_y_separator|>"]
    return ["<|image_start|>", *(row * rows if rows * columns > 1 else ()), "<|image|>", count, "<|image_end|>"]


def soft(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """One token per pooled patch (Gemma 4)."""
    return ["<|image>", int(features["num_soft_tokens_per_image"][0]), "<image|>"]


def measured(picture: Image.Image) -> Image.Image:
    """Resize to 70 to 1120 tokens of 48 by 48 pixels; transformers scales every picture up or down to 280 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = picture.size
    rows, columns = smart_resize(height, width, factor=48, min_pixels=70 * 48**2, max_pixels=1120 * 48**2)
    return picture.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC) if (width, height) != (columns, rows) else picture


PAD = (122, 116, 104)  # image_pad_color of clip.cpp


def squared(picture: Image.Image) -> Image.Image:
    """Pad to a square, as LLaVA-1.5's authors do; transformers crops instead."""
    side = max(picture.size)
    return ImageOps.pad(picture.convert("RGB"), (side, side), color=PAD)


GEMMA3 = Picture(fixed("<start_of_image>", "mm_tokens_per_image", "<end_of_image>"), types="token_type_ids")
GEMMA4 = Picture(soft, ("pixel_values", "image_position_ids"), "mm_token_type_ids", {"do_resize": False}, prepare=measured)
LLAMA4 = Picture(tiled, processor=llama4.image_processor)
LLAVA = Picture(fixed("", "image_seq_length", ""), prepare=squared)
ANYRES = Picture(anyres, ("pixel_values", "image_sizes"))
SMOLVLM = Picture(tiles, ("pixel_values", "pixel_attention_mask"), options={"return_row_col_info": True})
INTERNVL = Picture(crops, options={"crop_to_patches": True})
MINICPM = Picture(slices, ("pixel_values", "target_sizes"))
RESAMPLED = Picture(resampled, ("pixel_values", "target_sizes"))
PIXTRAL = Picture(rows, ("pixel_values", "image_sizes"), inside=("[IMG_BREAK]",))
GLM = Picture(grid("<|begin_of_image|>", "<|end_of_image|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
QWEN = Picture(grid("<|vision_start|>", "<|vision_end|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
DOTS = Picture(grid("<|img|>", "<|endofimg|>"), ("pixel_values", "image_grid_thw"))
PADDLE = Picture(grid("<|IMAGE_START|>", "<|IMAGE_END|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
