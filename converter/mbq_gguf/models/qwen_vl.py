"""Reads the language model of Qwen-VL as published (QWenLMHeadModel, which is code in the model directory) as transformers' Qwen2.

Qwen2 computes the same up to ``seq_length`` tokens. Beyond them Qwen-VL scales its rotary embedding (dynamic NTK) and its queries (log n
attention), which neither Qwen2 nor llama.cpp does. The file's context length is therefore ``seq_length``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbq_gguf.models import tiktoken
from mbq_gguf.models.checks import check_heads, positive_integers, positive_number
from mbq_gguf.models.text_model import QKV, TextModel, check_assumed

PUBLISHED = "QWenLMHeadModel"
OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
INSIDE = {
    "ln_1": "input_layernorm",
    "attn.c_attn": QKV,
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
END = "<|endoftext|>"
# They follow the vocabulary's tokens, in this order.
SPECIALS = (
    *(END, "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # the same as Qwen2's
)


def text_model(published: Mapping[str, Any]) -> TextModel:
    """The language model of a checkpoint whose config.json is ``published``. Raises UserError if Qwen2 does not support its settings."""
    width, heads, ffn = positive_integers(published, ("hidden_size", "num_attention_heads", "intermediate_size"))
    assumed = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False, "kv_channels": width // heads}
    check_assumed(published, assumed)
    check_heads(width, heads, heads)
    base = positive_number({"rotary_emb_base": 10000, **published}, "rotary_emb_base", whole=False)
    settings = {
        "vocab_size": positive_number(published, "vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": positive_number(published, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": ffn // 2,  # of gate and up together
        "rms_norm_eps": positive_number(published, "layer_norm_epsilon", whole=False),
        "max_position_embeddings": positive_number(published, "seq_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(base)},
        "tie_word_embeddings": False,
    }
    return TextModel("qwen2", settings, OUTSIDE, "transformer.h.", INSIDE, tokenizer, "qwen2")


def tokenizer(model_dir: Path) -> Any:
    """transformers' tokenizer for ``model_dir``."""
    return tiktoken.tokenizer(model_dir / "qwen.tiktoken", WORDS, SPECIALS, whole=False, eos_token=END, pad_token=END)
