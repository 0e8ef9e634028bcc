"""Reads InternVL as OpenGVLab publishes it (InternVLChatModel, code in the model directory) as transformers' class, without that code.

The same models are also published for transformers, with -hf in their name; only the names of tensors and settings differ. Settings are
from OpenGVLab's configuration_intern_vit.py and configuration_internvl_chat.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UserError
from mbq_gguf.models import as_llama
from mbq_gguf.models.checks import positive_integers, read_json_object
from mbq_gguf.models.tokenizer import load_tokenizer

ARCHITECTURE = "InternVLChatModel"
PUBLISHED = (ARCHITECTURE, *(f"{ARCHITECTURE}/{kind}" for kind in as_llama.MODEL_TYPES))
IMAGE_TOKEN = "<IMG_CONTEXT>"
LANGUAGE_MODEL = "language_model."
# Published prefixes of tensor names, and transformers'.
SPELLED = (
    ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding", "vision_tower.embeddings.patch_embeddings.projection"),
    ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
    ("mlp1.0", "multi_modal_projector.layer_norm"),
    ("mlp1.1", "multi_modal_projector.linear_1"),
    ("mlp1.3", "multi_modal_projector.linear_2"),
)
BLOCK = (
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
MERGED = ".attn.qkv."
PARTS = (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
VISION = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_type": "norm_type",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}


def names_of(name: str) -> list[str]:
    """transformers' names of the tensor published as ``name``: three for a fused qkv."""
    for beginning, ours in SPELLED:
        if name.startswith(beginning):
            name = ours + name.removeprefix(beginning)
            break
    if name.startswith(LANGUAGE_MODEL):
        return as_llama.names_of(name)
    if not name.startswith("vision_tower."):
        return [name]
    for theirs, ours in BLOCK:
        name = name.replace(theirs, ours)
    return [name.replace(MERGED, part) for part in PARTS] if MERGED in name else [name]


def rename_tensors(tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A published checkpoint's tensors, renamed to transformers' names."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found |= zip(names_of(name), parts_of(name, tensor, config), strict=True)
    return found


def parts_of(name: str, tensor: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """The tensors of :func:`names_of`, split from the published one."""
    if name.startswith(LANGUAGE_MODEL):
        return as_llama.parts_of(name, tensor, config.text_config.num_attention_heads, config.text_config.num_key_value_heads)
    return list(tensor.chunk(3)) if MERGED in name else [tensor]


def configuration(model_dir: Path) -> Any:
    """transformers' configuration of the published model in ``model_dir``. Raises UserError for InternVL before version 2."""
    from transformers import AutoConfig

    published = read_json_object(model_dir / "config.json")
    if published.get("ps_version", "v2") != "v2" or published.get("select_layer", -1) != -1:
        raise UserError(f"{model_dir} is an InternVL older than version 2 (ps_version, select_layer): use a newer one")
    vision = {ours: published["vision_config"][name] for name, ours in VISION.items() if name in published["vision_config"]}
    ratio, side = published.get("downsample_ratio", 0.5), vision["image_size"] // vision["patch_size"]
    text = published["llm_config"]
    if as_llama.language_model(published):
        text = as_llama.settings(text)
    return AutoConfig.for_model(
        "internvl",
        text_config=text,
        vision_config=vision | {"use_mean_pooling": True},
        downsample_ratio=ratio,
        image_seq_length=int(side**2 * ratio**2),
        image_token_id=load_tokenizer(model_dir).convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        architectures=["InternVLForConditionalGeneration"],
    )


def check(config: Mapping[str, Any]) -> None:
    """Raise UserError if a published config.json lacks required settings."""
    if (config.get("architectures") or [None])[0] == ARCHITECTURE:
        positive_integers(config.get("vision_config") or {}, SIZES)
        if not config.get("llm_config"):
            raise UserError("llm_config is missing in the model's config.json: download the model again")


def empty_model(model_dir: Path) -> Any:
    """The transformers model; without weights if the default device is torch's meta device."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(configuration(model_dir))


def image_processor(model_dir: Path) -> Any:
    """transformers' image processor, which cuts pictures into tiles with the settings of ``model_dir``."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    published, settings = (read_json_object(model_dir / name) for name in ("config.json", "preprocessor_config.json"))
    side = published.get("force_image_size") or published["vision_config"]["image_size"]
    return GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
        min_patches=published.get("min_dynamic_patch", 1),
        max_patches=published.get("max_dynamic_patch", 12),
        crop_to_patches=True,
    )
