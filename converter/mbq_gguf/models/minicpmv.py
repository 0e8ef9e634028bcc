"""Reads MiniCPM-V 2.6 and 4.5 as OpenBMB publishes them (MiniCPMV, which is code in the model directory) without running that code.

The versions differ in their language model. The resampler of 4.5 also embeds the time of video frames, which pictures do not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import read_json_object

IMAGE_TOKEN = "<unk>"  # the placeholder for a picture's tokens in the published processor
PREFIXES = {
    "llm.lm_head.": "lm_head.",
    "llm.model.": "model.language_model.",
    "vpm.": "model.vision_tower.",
    "resampler.": "model.resampler.",
}
MERGED = ".attn.in_proj_"
PROJECTOR = "resampler.proj"  # a parameter, not a linear: stored transposed
# The language model of each version: its type and class in transformers, and the version's number in llama.cpp.
TEXTS = {"2.6": ("qwen2", "Qwen2ForCausalLM", 3), "4.5": ("qwen3", "Qwen3ForCausalLM", 6)}
ARCHITECTURE = "MiniCPMV"
PUBLISHED = tuple(f"{ARCHITECTURE}/{version}" for version in TEXTS)
TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_bias"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps")


def version_of(config: Mapping[str, Any]) -> str | None:
    """The version of a model whose config.json is ``config``; None if it is not one of :data:`TEXTS`."""
    version = str(config.get("version"))
    return version if version in TEXTS and ARCHITECTURE in (config.get("architectures") or ()) else None


def names_of(name: str) -> list[str]:
    """The names here of the tensor published as ``name``: three for a fused qkv."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    ours = PREFIXES.get(prefix, "") + name.removeprefix(prefix)
    if name == PROJECTOR:
        return [f"{ours}.weight"]
    return [ours.replace(MERGED, f"{MERGED}{part}.") for part in "qkv"] if MERGED in name else [ours]


def parts_of(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of :func:`names_of`, split from the published one."""
    if name == PROJECTOR:
        return [tensor.t()]
    return list(tensor.chunk(3)) if MERGED in name else [tensor]


def rename_tensors(tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A published checkpoint's tensors, renamed to the names here."""
    return {ours: part for name, tensor in tensors.items() for ours, part in zip(names_of(name), parts_of(name, tensor), strict=True)}


def configuration(model_dir: Path) -> Any:
    """The configuration for :class:`~mbq_gguf.models.resampler.MiniCPMV`. Raises UserError for settings that are not supported."""
    from transformers import AutoConfig, AutoTokenizer

    published = read_json_object(model_dir / "config.json")
    version = version_of(published)
    assert version is not None
    if published.get("drop_vision_last_layer"):
        raise UserError(f"{model_dir} omits the last layer of its vision tower (drop_vision_last_layer): use a model that keeps it")
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {model_dir} has no token {IMAGE_TOKEN}: download it again")
    vision = {name: published["vision_config"][name] for name in VISION if name in published["vision_config"]}
    text = {name: published[name] for name in TEXT if published.get(name) is not None}
    return AutoConfig.for_model(
        "llava",
        text_config=text | {"model_type": TEXTS[version][0]},
        vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        query_num=published.get("query_num", 64),
        tie_word_embeddings=bool(published.get("tie_word_embeddings", False)),
    )


def empty_model(model_dir: Path) -> Any:
    """The model; without weights if the default device is torch's meta device."""
    from mbq_gguf.models.resampler import MiniCPMV

    return MiniCPMV(configuration(model_dir))


def image_processor(model_dir: Path) -> Any:
    """transformers' image processor of MiniCPM-V 4.6, changed for towers that do not merge patches."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    class Unmerged(MiniCPMV4_6ImageProcessorPil):  # type: ignore[misc]
        """Sides of a picture are multiples of one patch, not of a merged one."""

        def find_best_resize(
            self, image_size: tuple[int, int], scale_resolution: int, patch_size: int, downsample_mode: str, allow_upscale: bool = False
        ) -> tuple[int, int]:
            """Height and width. The picture keeps its shape and gets a slice's area, if it is larger or may be enlarged."""
            height, width = image_size
            if height * width > scale_resolution**2 or allow_upscale:
                ratio = width / height
                height = int(scale_resolution / ratio**0.5)
                width = int(height * ratio)
            rows, columns = (max(round(side / patch_size), 1) for side in (height, width))
            return rows * patch_size, columns * patch_size

    settings = picture_settings(read_json_object(model_dir / "preprocessor_config.json"))
    if not settings["slice_mode"]:
        raise UserError(f"{model_dir} does not slice pictures (slice_mode), and llama.cpp always does: use a model that slices them")
    return Unmerged(**settings)


def picture_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """The image processor's settings from a published preprocessor_config.json."""
    mean, std = (published.get(f"norm_{name}") or published.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std"))
    defaults = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14, "slice_mode": True}
    return {"image_mean": mean, "image_std": std, **{name: published.get(name, value) for name, value in defaults.items()}}
