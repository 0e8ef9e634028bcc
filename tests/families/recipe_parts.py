"""Settings that small checkpoints of several families share."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
QWEN3_5: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 4,  # llama.cpp takes every fourth layer for one with attention
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 128}
SQUARES = {"size": {"shortest_edge": 1024, "longest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
SQUARES |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessor"}
PATCHES_14 = SQUARES | {"patch_size": 14}
SIGLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
