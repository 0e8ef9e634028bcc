"""What llama.cpp puts in the place of a picture in a prompt, family by family (libmtmd, tools/mtmd/mtmd.cpp, init_vision).

Calibration must see the prompt that the file will be asked with. Processors of transformers write other text round a picture in some
families (two line ends in Gemma 3, one in LLaVA's template), and some want torchvision for videos, which nobody converts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Piece = str | int  # text, or a number of picture tokens
Counted = Callable[[Mapping[str, Any], Any, Any], list[Piece]]


@dataclass(frozen=True)
class Picture:
    """How a family's prompt shows a picture.

    ``pieces`` makes them of what the image processor gives, asked with ``options``, the processor and the model's configuration.
    ``features`` are what the model takes of the processor's output; ``types`` is the argument of its forward, if any, that marks picture
    tokens with 1 [1, tokens]. ``inside`` are texts whose tokens come from the vision file at run time.
    """

    pieces: Counted
    features: tuple[str, ...] = ("pixel_values",)
    types: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[str, ...] = ()


def grid(before: str, after: str) -> Counted:
    """Patches of a picture of any size, merged by squares (Qwen's and GLM's)."""

    def pieces(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
        return [before, int(features["image_grid_thw"][0].prod()) // processor.merge_size**2, after]

    return pieces


def fixed(before: str, name: str, after: str) -> Counted:
    """As many tokens for every picture as the configuration says under ``name``."""
    return lambda features, processor, config: [before, int(getattr(config, name)), after]


def tiles(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Tiles, each with its place, row by row; then the whole picture (Idefics3, SmolVLM)."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    pieces: list[Piece] = []
    for row in range(1, features["rows"][0][0] + 1):
        pieces += ["\n"] if row > 1 else []
        for column in range(1, features["cols"][0][0] + 1):
            pieces += [f"<fake_token_around_image><row_{row}_col_{column}>", count]
    return [*pieces, "\n\n", "<fake_token_around_image><global-img>", count, "<fake_token_around_image>"]


def crops(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Tiles and the whole picture, one behind another (InternVL)."""
    return ["<img>", int(features["num_patches"][0]) * config.image_seq_length, "</img>"]


def rows(features: Mapping[str, Any], processor: Any, config: Any) -> list[Piece]:
    """Rows of patches with a token between them (Pixtral)."""
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = (int(size) // side for size in features["image_sizes"][0])
    return [*[width, "[IMG_BREAK]"] * (height - 1), width, "[IMG_END]"]


GEMMA3 = Picture(fixed("<start_of_image>", "mm_tokens_per_image", "<end_of_image>"), types="token_type_ids")
LLAVA = Picture(fixed("", "image_seq_length", ""))
SMOLVLM = Picture(tiles, ("pixel_values", "pixel_attention_mask"), options={"return_row_col_info": True})
INTERNVL = Picture(crops, options={"crop_to_patches": True})
PIXTRAL = Picture(rows, ("pixel_values", "image_sizes"), inside=("[IMG_BREAK]",))
GLM = Picture(grid("<|begin_of_image|>", "<|end_of_image|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
QWEN = Picture(grid("<|vision_start|>", "<|vision_end|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
