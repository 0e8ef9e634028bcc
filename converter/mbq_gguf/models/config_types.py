"""Checks the types of config.json's settings by their names, which the families share, so that errors name the setting.

transformers and llama.cpp's conversion would fail on most of these too, but with Python exceptions that do not always name the setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mbq_gguf.errors import UserError

LARGEST = 2**31  # llama.cpp counts tokens, rows and layers in 32 bits
PARTS = ("text_config", "llm_config", "vision_config")  # the objects of config.json that are checked
ROPE = ("rope_parameters", "rope_scaling")  # within a part; Gemma has one such object for each kind of layer
# Settings that must not be null: of a part, or of a model whose language model's settings are in no part, and anywhere.
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_theta")
NEVER_NULL = (
    *("llm_config", "auto_map", "rope_type", "mm_tokens_per_image", "min_dynamic_patch", "max_dynamic_patch", "interleave_moe_layer_step"),
    *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "mrope_section", "deepstack_visual_indexes"),
)
SIZE = re.compile(
    r"(?:hidden|intermediate|vocab|patch|temporal_patch|spatial_merge|image|moe_intermediate|out_hidden)_size|intermediate_size_mlp|depth"
    r"|(?:embed|global_head|linear_key_head|linear_value_head|vision_output|projector_input|projector_output)_dim|num_local_experts|num_experts_per_tok"
    r"|num_(?:\w+_)?(?:heads|channels)|num_(?:hidden_)?layers|(?:original_)?max_position_embeddings|interleave_moe_layer_step"
)
FEW = {  # per picture: transformers builds lists of this length, or of all layouts with this many tiles
    "mm_tokens_per_image": 1 << 16,
    "image_seq_length": 1 << 16,
    "query_num": 1 << 16,
    "min_dynamic_patch": 100,
    "max_dynamic_patch": 100,
}
# Settings that may be lists: height and width, or one value per layer or stage.
SEVERAL = ("image_size", "patch_size", "intermediate_size", "moe_intermediate_size", "embed_dim", "num_heads")
COUNT = re.compile(r"num_experts|num_kv_shared_layers|max_window_layers|projection_dim|head_dim")  # 0 means none
NUMBER = re.compile(r"(?!long_|short_|layer_)\w+_(?:eps|theta|range|dropout|factor|prob)|factor")
DIVISORS = ("downsample_ratio", "pixel_shuffle_ratio", "low_freq_factor", "high_freq_factor")
FLAG = re.compile(r"bias|\w+_bias|tie_word_embeddings|use_(?:cache|qk_norm|sliding_window)|qk_normalization|norm_topk_prob")
WORD = re.compile(r"model_type|(?!is_)\w+_act|hidden_activation|dtype|torch_dtype|norm_type|rope_type|type")
OBJECT = re.compile(r"(?:text|llm|vision)_config|rope_parameters|rope_scaling|(?:full|sliding)_attention")
WORDS = re.compile(r"architectures|layer_types")
WHOLES = re.compile(r"mrope_section|deepstack_visual_indexes|no_rope_layers|moe_layers")


def check_config_types(config: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting of config.json, its language model or its vision tower that has a wrong type."""
    check_object(config, "", flat=not any(part in config for part in PARTS[:2]))
    for part in PARTS:
        check_object(config.get(part) or {}, f"{part}.")


def check_object(settings: Mapping[str, Any], place: str, *, flat: bool = False) -> None:
    """The same for one object of config.json, at ``place``, or for the whole of one with the language model's settings (``flat``)."""
    for name, value in settings.items():
        needed = name in NEVER_NULL or (name in NEEDED and (place or flat))
        wanted = "value" if value is None and needed else expected_type(name, value)
        if wanted:
            raise UserError(f"{place}{name} in the model's config.json is {value!r:.60} and no {wanted}: download the model again")
        if isinstance(value, dict) and (name in ROPE or place.endswith(tuple(f"{name}." for name in ROPE))):
            check_object(value, f"{place}{name}.")


def expected_type(name: str, value: Any) -> str | None:
    """The type that setting ``name`` must have, in words, if ``value`` is of another; None if it is valid or unknown here."""
    if value is None:  # the class uses its default
        return None
    if OBJECT.fullmatch(name):
        return None if isinstance(value, dict) else "JSON object"
    if WORDS.fullmatch(name):
        return None if value and isinstance(value, list) and all(isinstance(item, str) for item in value) else "list of words"
    if WHOLES.fullmatch(name):
        return None if isinstance(value, list) and all(is_integer(item, 0) for item in value) else "list of whole numbers"
    if WORD.fullmatch(name):
        return None if isinstance(value, str) else "word"
    if FLAG.fullmatch(name):
        return None if isinstance(value, bool) else "true or false"
    if name in DIVISORS:
        return None if is_number(value) and value > 0 else "number above 0"
    if NUMBER.fullmatch(name):
        return None if is_number(value) else "number"
    if COUNT.fullmatch(name):
        return None if is_integer(value, 0) else "whole number from 0 up"
    if name in FEW:
        return None if is_integer(value, 1) and value <= FEW[name] else f"whole number from 1 to {FEW[name]}"
    if name == "original_max_position_embeddings":  # its logarithm is a divisor
        return None if is_integer(value, 2) else "whole number above 1"
    if name == "auto_map":
        return None if isinstance(value, dict) and isinstance(value.get("AutoConfig", ""), str) else "object of words"
    if SIZE.fullmatch(name):
        several = value if name in SEVERAL and isinstance(value, list) and len(value) > 1 else [value]
        return None if all(is_integer(item, 1) for item in several) else "whole number above 0"
    return None


def is_integer(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer from ``least`` up to llama.cpp's limit."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
