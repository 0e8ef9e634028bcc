"""Writes a model's own limits on picture size to its vision file.

Families with dynamic resolution scale a picture to an area between two limits. llama.cpp has fixed limits per family. If a model's limits
differ, pictures would get more or fewer tokens than in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEAST, MOST = "clip.vision.image_min_pixels", "clip.vision.image_max_pixels"


def picture_limits(model_dir: Path, preprocessor_config: Mapping[str, Any]) -> dict[str, int]:
    """GGUF keys of the limits in pixels by which transformers resizes a picture for ``model_dir``; none if sizes have another rule.

    If transformers cannot load the image processor, the limits are taken from ``preprocessor_config``.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(str(model_dir), local_files_only=True, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        found = (preprocessor_config.get("min_pixels"), preprocessor_config.get("max_pixels"))
    else:
        found = area_limits(processor)
    least, most = found
    if not isinstance(least, int) or not isinstance(most, int) or not 0 < least <= most:
        return {}
    return {LEAST: least, MOST: most}


def area_limits(processor: Any) -> tuple[int | None, int | None]:
    """The least and most pixels of one picture, (None, None) for an image processor that does not bound the area."""
    resize = getattr(inspect.getmodule(type(processor)), "smart_resize", None)
    parameters = inspect.signature(resize).parameters if resize else {}
    # GLM 5 has another rule under this name, with limits in tokens, which llama.cpp handles itself.
    if not {"min_pixels", "max_pixels"} <= parameters.keys() or hasattr(processor, "min_image_tokens"):
        return None, None
    # GLM-4V counts the pixels of a picture once for each frame of a temporal patch.
    frames = processor.temporal_patch_size if "num_frames" in parameters else 1
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    return (-(-least // frames), most // frames) if least and most else (None, None)
