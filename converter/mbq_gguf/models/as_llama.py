"""Reads the language models of InternVL 2 that are equivalent to Llama (InternLM2, Phi-3) as a Llama: settings and tensors.

They use other names and fused matrices. InternLM2 fuses queries, keys and values; for each key head, the query heads that share it come
first, then the key head, then the value head. Phi-3 fuses all queries, all keys and all values, and gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import check_heads, positive_integers

INTERNLM2, PHI3 = "internlm2", "phi3"
MODEL_TYPES = (INTERNLM2, PHI3)
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
QKV = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
BY_KEY_HEAD = "attention.wqkv."
MERGED = {BY_KEY_HEAD: QKV, "self_attn.qkv_proj.": QKV, "mlp.gate_up_proj.": ("mlp.gate_proj.", "mlp.up_proj.")}
# Settings with the same names in Llama. InternLM2 is published with dynamic RoPE scaling. Up to max_position_embeddings that is plain RoPE,
# which is what llama.cpp computes; it has no such scaling, and warns if a context is longer.
SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def language_model(config: Mapping[str, Any]) -> str | None:
    """The type of the language model in a published config.json, if it is one of :data:`MODEL_TYPES`, else None."""
    text = config.get("llm_config")
    return next((kind for kind in MODEL_TYPES if isinstance(text, dict) and text.get("model_type") == kind), None)


def check(config: Mapping[str, Any]) -> None:
    """Raise UserError if the language model in a published config.json is one of them, and its sizes are none."""
    if language_model(config):
        text = config["llm_config"]
        positive_integers(text, ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"))
        check_heads(*positive_integers(text, ("hidden_size", "num_attention_heads", "num_key_value_heads")))


def settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's settings for a published configuration. Raises UserError for features that Llama or llama.cpp lacks."""
    found = {name: published[name] for name in SETTINGS if published.get(name) is not None}
    found |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if published["model_type"] == INTERNLM2:
        return found | {"attention_bias": published.get("bias", True)}
    window = published.get("sliding_window")
    if (window and window < published["max_position_embeddings"]) or published.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("only a Phi-3 without sliding window and partial rotary embedding can be converted: use InternVL2-4B")
    if scales := found.pop("rope_scaling", None):  # per pair of channels, for texts up to the original length and for longer ones
        factors = {name: scales[name] for name in ("short_factor", "long_factor")}
        pairs = published["hidden_size"] // published["num_attention_heads"] // 2
        for name, factor in factors.items():
            if not isinstance(factor, list) or len(factor) != pairs:
                raise UserError(
                    f"rope_scaling's {name} in the model's config.json is not a list of {pairs} factors: download the model again"
                )
        original = published["original_max_position_embeddings"]
        factors |= {"factor": published["max_position_embeddings"] / original, "original_max_position_embeddings": original}
        found["rope_parameters"] = {"rope_type": "longrope", "rope_theta": found.pop("rope_theta"), **factors}
    return found


def names_of(name: str) -> list[str]:
    """Llama's names for the tensor ``name``: two or three if it is fused; unknown names are kept."""
    for theirs, ours in SPELLED.items():
        if f".{theirs}" in f".{name}":
            return [name.replace(theirs, ours)]
    merged = next((merged for merged in MERGED if merged in name), None)
    return [name.replace(merged, part) for part in MERGED[merged]] if merged else [name]


def parts_of(name: str, tensor: Any, heads: int, key_heads: int) -> list[Any]:
    """The tensors of :func:`names_of`, matrices or biases of ``tensor`` [rows, ...], each with its heads in order.

    Raises UserError if the rows of ``tensor`` are not those of so many heads.
    """
    parts = len(names_of(name))
    unit = {1: 1, 2: 2, 3: heads + 2 * key_heads}[parts]
    if parts > 1 and (not tensor.ndim or tensor.shape[0] == 0 or tensor.shape[0] % unit):
        raise UserError(
            f"{name} is {tuple(tensor.shape)} and its rows are not a multiple of {unit}, as config.json asks: download the model again"
        )
    if parts < 3:
        return list(tensor.chunk(parts))
    if BY_KEY_HEAD not in name:
        channels = tensor.shape[0] // (heads + 2 * key_heads)
        return list(tensor.split([channels * count for count in (heads, key_heads, key_heads)]))
    shared = heads // key_heads
    groups = tensor.reshape(key_heads, shared + 2, -1, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in (groups[:, :shared], groups[:, shared], groups[:, shared + 1])]
