"""Settings of the wrong type: each is named, with its value, and those of published models pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import check_counts, check_feature_layers, check_image_size
from mbq_gguf.models.config_types import check_config_types
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

SOUND: dict[str, Any] = {  # a little of many families
    "architectures": ["AVisionModel"],
    "auto_map": {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]},
    "tie_word_embeddings": False,
    "downsample_ratio": 0.5,
    "max_dynamic_patch": 12,
    "merge_kernel_size": [2, 2],
    "vision_feature_layer": -2,
    "text_config": {
        "architectures": None,
        "hidden_size": 128,
        "head_dim": None,
        "num_experts": 0,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0,
        "layer_types": ["full_attention"],
        "no_rope_layers": [],
        "rope_scaling": {"type": "su", "rope_theta": 1000000, "short_factor": [1.0, 1.1], "mrope_section": [2, 1, 1]},
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "vision_config": {"image_size": [64, 64], "patch_size": 16, "hidden_act": "gelu", "size": {"longest_edge": 64}, "projection_dim": 0},
}


def test_what_is_published_passes() -> None:
    check_config_types(SOUND)


@pytest.mark.parametrize("name", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_what_transformers_saves_passes(name: str) -> None:
    """Every setting of every model that takes pictures, as its class has it by itself."""
    settings = json.loads(AutoConfig.for_model(name).to_json_string(use_diff=False))
    check_config_types(settings)
    check_counts(settings)
    check_image_size(settings)
    check_feature_layers(settings)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("text_config.hidden_size", "128", "is '128' and no whole number above 0"),
        ("text_config.hidden_size", None, "is None and no value"),
        ("text_config.num_attention_heads", -4, "is -4 and no whole number above 0"),
        ("text_config.num_local_experts", 0, "is 0 and no whole number above 0"),
        ("text_config.num_experts_per_tok", 0, "is 0 and no whole number above 0"),
        ("text_config.vocab_size", 2**31, "is 2147483648 and no whole number above 0"),
        ("text_config.num_key_value_heads", 2.0, "is 2.0 and no whole number above 0"),
        ("text_config.num_experts", True, "is True and no whole number from 0 up"),
        ("text_config.rms_norm_eps", [1e-5], r"is \[1e-05\] and no number"),
        ("text_config.rms_norm_eps", float("nan"), "is nan and no number"),
        ("text_config.use_qk_norm", "yes", "is 'yes' and no true or false"),
        ("text_config.layer_types", "full", "is 'full' and no list of words"),
        ("text_config.rope_scaling.rope_theta", None, "is None and no value"),
        ("text_config.rope_scaling.mrope_section", [1, "x"], "no list of whole numbers"),
        ("text_config.rope_parameters.full_attention.rope_type", 3, "is 3 and no word"),
        ("text_config.rope_parameters.full_attention", 3, "is 3 and no JSON object"),
        ("text_config.original_max_position_embeddings", 1, "is 1 and no whole number above 1"),
        ("vision_config.image_size", [64, "x"], "no whole number above 0"),
        ("vision_config", ["x"], "no JSON object"),
        ("llm_config", None, "is None and no value"),
        ("vision_config.deepstack_visual_indexes", None, "is None and no value"),
        ("vision_config.deepstack_visual_indexes", 3.5, "is 3.5 and no list of whole numbers"),
        ("max_dynamic_patch", 10**9, "is 1000000000 and no whole number from 1 to 100"),
        ("mm_tokens_per_image", 10**9, "no whole number from 1 to 65536"),
        ("downsample_ratio", 0, "is 0 and no number above 0"),
        ("downsample_ratio", "x" * 1000, "is 'xxx"),
    ],
)
def test_another_kind_is_named(place: str, value: Any, words: str) -> None:
    *parts, name = place.split(".")
    spoilt: Any = {name: value}
    for part in reversed(parts):
        spoilt = {part: spoilt}
    with pytest.raises(UserError, match=rf"^{place} in the model's config.json .*{words}.*: download the model again$") as raised:
        check_config_types(SOUND | spoilt)
    assert len(str(raised.value)) < 200


def test_a_flat_model_s_settings_are_those_of_a_language_model() -> None:
    flat = {name: value for name, value in SOUND.items() if name != "text_config"}
    check_config_types(flat | {"vocab_size": 500})
    check_config_types(SOUND | {"vocab_size": None})
    with pytest.raises(UserError, match=r"^vocab_size in the model's config.json is None and no value"):
        check_config_types(flat | {"vocab_size": None})


def test_features_of_a_layer_that_the_tower_lacks() -> None:
    check_feature_layers({"vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 2]}})
    with pytest.raises(UserError, match=r"^deepstack_visual_indexes in .* is \[0, 3\] and the tower has 3 layers: download"):
        check_feature_layers({"vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 3]}})
