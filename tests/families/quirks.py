"""The specific features of each family (quirk.py explains how they are ignored)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from mbq_gguf.models import resampler
from quirk import Attribute, Held, Input, Module, OthersKeys, Patched, Quirk, Setting, Ungrouped
from small import Small
from torch import nn


def passed_by(_module: nn.Module, args: tuple[Any, ...], _out: Any) -> Any:
    return args[0]


def nothing(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    return torch.zeros_like(out)


def without_bias(module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    return out - module.bias


def without_one(module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    """Of a norm that multiplies by 1 + weight."""
    return out * module.weight / (1 + module.weight)


def twice(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    """The angles of half of a head's channels, for all of them."""
    return tuple(torch.cat([angles, angles], dim=-1) for angles in out)


def plain_frequencies(pairs: int, theta: float = 10000.0) -> torch.Tensor:
    """Of a head's pairs of channels."""
    return theta ** -(torch.arange(pairs) / pairs)


def zeros(made: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return torch.zeros_like(made(*args))


def nearest(interpolate: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return interpolate(*args, **options | {"mode": "nearest"})


def whole_picture_last(pack: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Of anyres: tiles first."""
    packed, lengths = pack(*args, **options)
    return [torch.cat([features[TILE:], features[:TILE]]) for features in packed], lengths


def by_columns(pack: Callable[..., Any], features: Any, *args: Any, **options: Any) -> Any:
    """Of anyres: two rows of three tiles taken for three of two."""
    order = [0, 1, 3, 5, 2, 4, 6]
    return pack([tiles[order] for tiles in features], *args, **options)


def cropped_elsewhere(unpad: Callable[..., Any], tensor: Any, size: Any) -> Any:
    """Of anyres: all of the padding is taken for one below the picture."""
    rows, columns = unpad(tensor, size).shape[1:]
    return tensor[:, :rows, :columns]


def packs(small: Small) -> Any:
    return small.loaded.model.model


def their_module(small: Small) -> Any:
    return sys.modules[type(small.loaded.model).__module__]


TILE = 16  # tokens of the small models' tiles
ANYRES = [
    Held("image_newline", 0.0),
    Patched("pack_image_features", packs, whole_picture_last),
    Patched("pack_image_features", packs, by_columns),
    Patched("unpad_image", their_module, cropped_elsewhere),
]
QK_NORMS = Module(r"language_model\..*self_attn\.[qk]_norm", passed_by)
QKV_BIASES = Module(r"language_model\..*self_attn\.[qkv]_proj", without_bias)
ONE = Module(r"language_model\.layers\.\d+\.input_layernorm", without_one)
DELTA_NORM = Module(r".*linear_attn\.norm", passed_by)
SHARED = Module(r".*mlp\.shared_experts?", nothing)
WINDOW = Setting("sliding_window", 1 << 20)
AFTER_ATTENTION = Module(r"language_model\..*post_attention_layernorm", passed_by)
AFTER_MLP = Module(r".*post_feedforward_layernorm", passed_by)
GLM_NORMS = [Module(r".*post_self_attn_layernorm", passed_by), Module(r".*post_mlp_layernorm", passed_by)]
PARTIAL = Module(r"language_model\.rotary_emb", twice)
UNSCALED = Held("inv_freq", lambda frequencies: plain_frequencies(len(frequencies)))
THETA = Held("rotary_emb.inv_freq", lambda frequencies: frequencies ** (2 / 3))  # of 10 000 where the settings say 1 000 000
LAYER_SCALES = [Held("lambda_1", 1.0), Held("lambda_2", 1.0)]
GEMMA4 = [QK_NORMS, AFTER_ATTENTION, AFTER_MLP, WINDOW, Input("mm_token_type_ids"), Held("layer_scalar", 1.0)]

QUIRKS: dict[str, list[Quirk]] = {
    "Qwen2-VL": [QKV_BIASES],
    "Qwen2.5-VL": [QKV_BIASES],
    "Qwen3-VL": [QK_NORMS, Module(r"visual\.deepstack_merger_list\.0", nothing)],
    "Qwen3.5": [QK_NORMS, DELTA_NORM, ONE],
    "MiniCPM-V 4.6": [
        DELTA_NORM,
        Module(r"vision_tower\.vit_merger\.self_attn\.out_proj", nothing),
        Module(r"vision_tower\.vit_merger\.linear_2", nothing),
    ],
    "MiniCPM-V 2.6": [
        QKV_BIASES,
        Patched("nearest_positions", lambda _: resampler, zeros),
        Patched("position_embeddings", lambda _: resampler, zeros),
        Held("resampler.query", 0.0),
        Module(r"resampler\.ln_kv", passed_by),
        Module(r"resampler\.ln_post", passed_by),
    ],
    "MiniCPM-V 4.5": [QK_NORMS],
    "Qwen3-VL-MoE": [QK_NORMS, Module(r".*mlp\.experts\.3", nothing)],
    "Qwen3.5-MoE": [SHARED],
    "GLM-4.5V": [SHARED, QKV_BIASES, Held("e_score_correction_bias", 0.0)],
    "Llama 4": [
        Module(r"language_model\..*feed_forward\.shared_expert", nothing),
        Module(r"language_model\..*self_attn\.qk_norm", passed_by),
        Attribute(r"language_model\..*feed_forward\.experts", "scales_inputs", False),
        Attribute(r"language_model\..*self_attn", "use_rope", True),
        Held("class_embedding", 0.0),
        Module(r"vision_model\.layernorm_pre", passed_by),
    ],
    "InternVL 3 (-hf)": [QKV_BIASES, *LAYER_SCALES],
    "InternVL 2 to 3.5": [*LAYER_SCALES, Held("embeddings.position_embeddings", 0.0)],
    "InternVL 2 and 2.5 (InternLM2)": [Ungrouped(), THETA, *LAYER_SCALES],
    "InternVL 2 (Phi-3)": [UNSCALED, Attribute(r"model\.language_model\.rotary_emb", "attention_scaling", 1.0)],
    "LLaVA-1.5": [Held("embeddings.class_embedding", 0.0), Module(r"vision_tower\.pre_layrnorm", passed_by)],
    "LLaVA-NeXT": [*ANYRES, Held("embeddings.class_embedding", 0.0)],
    "LLaVA-OneVision": [*ANYRES, Patched("interpolate", lambda small: nn.functional, nearest), QKV_BIASES],
    "Gemma 3": [QK_NORMS, AFTER_ATTENTION, AFTER_MLP, ONE, WINDOW, Input("token_type_ids")],
    "Gemma 4": [*GEMMA4, Held("std_scale", 1.0)],
    "Gemma 4 (E2B, E4B)": [
        Module(r"language_model\.embed_tokens_per_layer", nothing),
        Module(r"language_model\.per_layer_model_projection", nothing),
        Module(r"language_model\.layers\.\d+\.per_layer_projection", nothing),
        OthersKeys(),
        Held("output_max", 1e6),
        *GEMMA4,
    ],
    "Gemma 4 (experts)": [Module(r".*\.experts\.3", nothing), Held("per_expert_scale", 1.0), Held("router.scale", 1.0)],
    "GLM-4.1V": [QKV_BIASES, *GLM_NORMS, PARTIAL],
    "GLM-OCR": [*GLM_NORMS, PARTIAL],
    "dots.ocr": [
        Module(r"layers\..*self_attn\.[qkv]_proj", without_bias),
        Module(r"vision_tower\.patch_embed\.patchifier\.norm", passed_by),
        Module(r"vision_tower\.post_trunk_norm", passed_by),
    ],
    "PaddleOCR-VL": [
        Input("mm_token_type_ids"),
        Held("embeddings.position_embedding.weight", 0.0),
        Module(r"projector\.pre_norm", passed_by),
    ],
}
