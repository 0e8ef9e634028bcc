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


QWEN = Picture(grid("<|vision_start|>", "<|vision_end|>"), ("pixel_values", "image_grid_thw"), "mm_token_type_ids")
