"""Reads dots.ocr as published (DotsOCRForCausalLM, which is code in the model directory) without running that code.

The model itself is in dots_tower.py; its tensors have the published names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import read_json_object

PUBLISHED = "DotsOCRForCausalLM"
# Settings of the tower that llama.cpp assumes; they are also the defaults of the published configuration.
ASSUMED = {"post_norm": True, "temporal_patch_size": 1, "is_causal": False}


def rename_tensors(tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A published checkpoint's tensors; names are already those of the model here."""
    return dict(tensors)


def configuration(model_dir: Path) -> Any:
    """transformers' configuration of the language model, with the tower's settings as ``vision_config``.

    Raises UserError if llama.cpp does not support the tower's settings.
    """
    from transformers import AutoConfig

    published = read_json_object(model_dir / "config.json")
    vision = published["vision_config"]
    other = [name for name, value in ASSUMED.items() if vision.get(name, value) != value]
    if other:
        raise UserError(f"{model_dir} has a vision tower with another {other[0]} than dots.ocr: only dots.ocr itself is supported")
    left = ("model_type", "architectures", "auto_map")
    return AutoConfig.for_model("qwen2", **{name: value for name, value in published.items() if name not in left})


def empty_model(model_dir: Path) -> Any:
    """The model; without weights if the default device is torch's meta device."""
    from mbq_gguf.models.dots_tower import DotsOCR

    return DotsOCR(configuration(model_dir))


def image_processor(model_dir: Path) -> Any:
    """transformers' image processor of Qwen2-VL, with patches of a single frame."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = read_json_object(model_dir / "preprocessor_config.json")
    own = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    return Qwen2VLImageProcessorPil(**{name: settings[name] for name in own})
