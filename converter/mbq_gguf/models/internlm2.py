"""InternLM2, the language model of most InternVL 2 and 2.5, as the Llama that it is: settings and tensors.

Its layers compute what Llama's do, under other names, and with queries, keys and values in one matrix: for each key head the heads of
queries that share it, then the key's, then the value's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "internlm2"
SPELLED = {
    "tok_embeddings.": "embed_tokens.",
    "output.": "lm_head.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
}
MERGED = "attention.wqkv."
PARTS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
# Settings that Llama has by the same name. With a dynamic scale of its angles, as published, both compute plain ones up to
# max_position_embeddings, and so does llama.cpp, which knows no such scale and warns where a context is longer.
SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's settings of a published configuration."""
    found = {name: published[name] for name in SETTINGS if published.get(name) is not None}
    return found | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": published.get("bias", True)}


def names_of(name: str) -> list[str]:
    """What Llama calls the tensor ``name`` of InternLM2: three of them where queries, keys and values are one; others keep their name."""
    for theirs, ours in SPELLED.items():
        if f".{theirs}" in f".{name}":
            return [name.replace(theirs, ours)]
    return [name.replace(MERGED, part) for part in PARTS] if MERGED in name else [name]


def parts_of(merged: Any, heads: int, key_heads: int) -> list[Any]:
    """Queries, keys and values of the matrix or bias ``merged`` [(heads + 2 key_heads) * channels, ...], each with its heads in order."""
    shared = heads // key_heads
    groups = merged.reshape(key_heads, shared + 2, -1, *merged.shape[1:])
    parts = groups[:, :shared], groups[:, shared], groups[:, shared + 1]
    return [part.reshape(-1, *merged.shape[1:]) for part in parts]
