"""The language models of Qwen-VL, GLM-4V and CogVLM2 as their authors publish them: graphs, settings, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

from authors import CONTEXT, EPS, FFN, HEAD, HEADS, LAYERS, WIDTH, Graph, Published, ranks
from tokens import plain


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
GLM_SPECIALS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>")
GLM_SPECIALS += ("<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def glm_tokens(folder: Path) -> int:
    """GLM-4V's, and rows of the embeddings that have no token."""
    count = ranks(folder, "tokenizer.model")
    added = {str(count + place): {"content": token, "special": True} for place, token in enumerate(GLM_SPECIALS)}
    settings = {
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return count + len(added) + 20


def llama_tokens(folder: Path) -> int:
    """CogVLM2's are transformers' own."""
    return max(plain((), folder).values()) + 1


GLM = Published(
    Graph(
        layer="transformer.encoder.layers.{}.",
        embeddings="transformer.embedding.word_embeddings",
        norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        qkv="self_attention.query_key_value",
        out="self_attention.dense",
        gate=("mlp.dense_h_to_4h", 0),
        up=("mlp.dense_h_to_4h", 1),
        down="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"),
        groups=2,
        base=20000.0,
        turned=0.5,
        neighbours=True,
    ),
    {
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": FFN,
        "hidden_size": WIDTH,
        "kv_channels": HEAD,
        "layernorm_epsilon": EPS,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": 2,
        "seq_length": CONTEXT,
        "tie_word_embeddings": False,
        "vision_config": {"image_size": 1120, "patch_size": 14, "hidden_size": 1792, "num_hidden_layers": 63},
    },
    glm_tokens,
    biased=True,
    beside=("transformer.vision.linear_proj.linear_proj.weight", "transformer.vision.transformer.layers.0.mlp.fc1.weight"),
)
COGVLM2 = Published(
    Graph(
        layer="model.layers.{}.",
        embeddings="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        qkv="self_attn.language_expert_query_key_value",
        out="self_attn.language_expert_dense",
        gate=("mlp.language_mlp.gate_proj", None),
        up=("mlp.language_mlp.up_proj", None),
        down="mlp.language_mlp.down_proj",
        norms=("input_layernorm", "post_attention_layernorm"),
        groups=2,
        base=500000.0,
    ),
    {
        "architectures": ["CogVLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig", "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_multi_query_heads": 2,
        "rms_norm_eps": EPS,
        "template_version": "chat",
        "tie_word_embeddings": False,
        "vision_config": {"image_size": 1344, "patch_size": 14, "hidden_size": 1792, "num_hidden_layers": 63},
    },
    llama_tokens,
    beside=(
        "model.layers.0.self_attn.vision_expert_dense.weight",
        "model.layers.1.mlp.vision_mlp.gate_proj.weight",
        "model.vision.linear_proj.linear_proj.weight",
    ),
)

PUBLISHED = {"Qwen-VL": QWEN, "GLM-4V": GLM, "CogVLM2": COGVLM2}
