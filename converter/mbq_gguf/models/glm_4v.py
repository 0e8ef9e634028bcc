"""Reads the language model of GLM-4V-9B as published (ChatGLMModel, which is code in the model directory) as transformers' Glm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.models import tiktoken
from mbq_gguf.models.checks import check_heads, positive_integers, positive_number, read_json_object
from mbq_gguf.models.text_model import QKV, TextModel, check_assumed

PUBLISHED = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
OUTSIDE = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
INSIDE = {
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": QKV,
    "self_attention.dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
ASSUMED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "original_rope": True,
    "tie_word_embeddings": False,
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ASKED = ("layernorm_epsilon", "seq_length", "rope_ratio")
BEGIN = ("[gMASK]", "<sop>")  # start each text; in llama.cpp they are part of the chat template
SETTINGS = ("eos_token", "pad_token", "chat_template")  # of tokenizer_config.json


def text_model(published: Mapping[str, Any]) -> TextModel:
    """The language model of a checkpoint whose config.json is ``published``. Raises UserError if Glm does not support its settings."""
    width, heads, groups = positive_integers(published, ("hidden_size", "num_attention_heads", "multi_query_group_num"))
    check_assumed(published, ASSUMED | {"kv_channels": width // heads})
    check_heads(width, heads, groups)
    asked = {name: positive_number(published, name, whole=name == "seq_length") for name in ASKED}
    rope = {"rope_type": "default", "rope_theta": 10000.0 * asked["rope_ratio"], "partial_rotary_factor": 0.5}
    settings = {
        "vocab_size": positive_number(published, "padded_vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": positive_number(published, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width // heads,
        "intermediate_size": positive_number(published, "ffn_hidden_size"),
        "rms_norm_eps": asked["layernorm_epsilon"],
        "max_position_embeddings": asked["seq_length"],
        "rope_parameters": rope,
        "attention_bias": True,
        "tie_word_embeddings": False,
        **{name: published.get(name) for name in ("eos_token_id", "pad_token_id")},
    }
    return TextModel("glm", settings, OUTSIDE, "transformer.encoder.layers.", INSIDE, tokenizer, "glm4", asked, BEGIN)


def tokenizer(model_dir: Path) -> Any:
    """transformers' tokenizer for ``model_dir``, without the tokens that the authors' code puts before each text (BEGIN)."""
    settings, file = read_json_object(model_dir / "tokenizer_config.json"), model_dir / "tokenizer.model"
    added = {int(number): token["content"] for number, token in settings["added_tokens_decoder"].items()}
    specials = [added[number] for number in sorted(added)]
    kept = {name: settings[name] for name in SETTINGS if settings.get(name)}
    made = tiktoken.tokenizer(file, WORDS, specials, whole=True, **kept)
    if made.convert_tokens_to_ids(specials) != sorted(added):
        raise UserError(f"{file} does not have as many tokens as tokenizer_config.json beside it expects: download the tokenizer again")
    return made
