"""Reads the language model of CogVLM and CogVLM2 as published (CogVLMForCausalLM, code in the model directory) as transformers' Llama.

Picture tokens pass through other matrices (``vision_expert_*``, ``vision_mlp``), which are left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbq_gguf.models.checks import check_heads, positive_integers, positive_number
from mbq_gguf.models.text_model import QKV, TextModel, check_assumed

PUBLISHED = "CogVLMForCausalLM"
OUTSIDE = {name: name for name in ("model.embed_tokens", "model.norm", "lm_head")}
INSIDE = {
    "input_layernorm": "input_layernorm",
    "self_attn.language_expert_query_key_value": QKV,
    "self_attn.language_expert_dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    **{f"mlp.language_mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
GROUPS = "num_multi_query_heads"  # of CogVLM2
WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
BASE, OTHER_BASE = 500000.0, 10000.0  # of the rotary embedding in the code of CogVLM2 and of CogVLM; config.json has neither


def text_model(published: Mapping[str, Any]) -> TextModel:
    """The language model of a checkpoint whose config.json is ``published``. Raises UserError if Llama does not support its settings."""
    check_assumed(published, {"hidden_act": "silu", "tie_word_embeddings": False})
    width, heads = positive_integers(published, ("hidden_size", "num_attention_heads"))
    groups = positive_number(published, GROUPS) if GROUPS in published else heads
    check_heads(width, heads, groups)
    settings = {
        **{name: positive_number(published, name) for name in WHOLE},
        "rms_norm_eps": positive_number(published, "rms_norm_eps", whole=False),
        **{name: published.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "num_key_value_heads": groups,
        "rope_parameters": {"rope_type": "default", "rope_theta": BASE if GROUPS in published else OTHER_BASE},
        "tie_word_embeddings": False,
    }
    return TextModel("llama", settings, OUTSIDE, "model.layers.", INSIDE)
