"""Small checkpoints of Gemma's models."""

from __future__ import annotations

from dataclasses import replace

from forms import nested, with_unread
from recipe import Recipe
from recipe_parts import NORMAL, SIGLIP, TEXT

GEMMA4 = Recipe(
    "gemma4",
    {
        "text_config": {**TEXT, "num_hidden_layers": 3, "sliding_window": 16, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"], "global_head_dim": 64, "num_global_key_value_heads": 1}
        | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
        | {"final_logit_softcapping": 30.0},
        "vision_config": {**SIGLIP, "num_key_value_heads": 2, "head_dim": 32, "position_embedding_size": 3360, "standardize": True},
        "audio_config": None,
    },
    {"max_soft_tokens": 70, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "image_processor_type": "Gemma4ImageProcessor"},
    specials=("<|image>", "<image|>", "<|image|>"),
    token_ids={"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"},
    spaced=True,
    size=(480, 336),
    sizes=((100, 160), (700, 500)),
)
# As E2B: its last layers take keys and values of the last ones of their kind before them and have twice the MLP, and each layer is given
# something of each token. The runtime tells by a width of 1536 or 2560 that pictures do not see themselves, which others' do.
GEMMA4_SMALL = {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32}
GEMMA4_SMALL |= {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"]}
GEMMA4_SMALL |= {"attention_k_eq_v": False, "num_global_key_value_heads": None, "pad_token_id": 0}
AUDIO = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 128,
}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256}

GEMMA: dict[str, Recipe] = {
    "Gemma 3": Recipe(
        "gemma3",
        {
            "text_config": {**TEXT, "num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
            | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},  # llama.cpp takes every sixth layer for a full one
            "vision_config": {**SIGLIP, "image_size": 128, "vision_use_head": False},
            "mm_tokens_per_image": 16,
        },
        NORMAL | {"size": {"height": 128, "width": 128}, "image_seq_length": 16, "image_processor_type": "Gemma3ImageProcessor"},
        specials=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        token_ids={"image_token_id": "<image_soft_token>", "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
        other_names=nested,
        size=(128, 128),
    ),
    "Gemma 4": GEMMA4,
    "Gemma 4 (experts)": replace(GEMMA4, config=GEMMA4.config | {"text_config": GEMMA4.config["text_config"] | GEMMA4_EXPERTS}),
    "Gemma 4 (E2B, E4B)": replace(
        GEMMA4,
        config=GEMMA4.config
        | {"text_config": GEMMA4.config["text_config"] | GEMMA4_SMALL}
        | {"vision_config": GEMMA4.config["vision_config"] | {"standardize": False, "use_clipped_linears": True}, "audio_config": AUDIO},
        specials=(*GEMMA4.specials, "<|audio|>"),
        token_ids={**GEMMA4.token_ids, "audio_token_id": "<|audio|>"},
        other_form=with_unread,
    ),
}
