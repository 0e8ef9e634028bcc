"""The language model of Qwen-VL as its authors publish it: graphs, settings, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

from authors import CONTEXT, EPS, FFN, HEAD, HEADS, LAYERS, WIDTH, Graph, Published, ranks


def qwen_tokens(folder: Path) -> int:
    """Qwen-VL's, and rows of the embeddings that have no token."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
                "model_max_length": 8192,
            }
        )
    )
    return ranks(folder, "qwen.tiktoken") + 217 + 20


QWEN = Published(
    Graph(
        layer="transformer.h.{}.",
        embeddings="transformer.wte",
        norm="transformer.ln_f",
        head="lm_head",
        qkv="attn.c_attn",
        out="attn.c_proj",
        gate=("mlp.w2", None),
        up=("mlp.w1", None),
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
    ),
    {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "model_type": "qwen",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * FFN,
        "kv_channels": HEAD,
        "layer_norm_epsilon": EPS,
        "max_position_embeddings": 4 * CONTEXT,
        "no_bias": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": CONTEXT,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {"image_size": 448, "patch_size": 14, "width": 1664, "layers": 48},
    },
    qwen_tokens,
    biased=True,
    beside=("transformer.visual.proj", "transformer.visual.transformer.resblocks.0.attn.in_proj.weight"),
)

PUBLISHED = {"Qwen-VL": QWEN}
