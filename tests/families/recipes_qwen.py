"""Small checkpoints of Qwen's models."""

from __future__ import annotations

from forms import qwen2_newer, stacked, turned_stacks
from recipe import Recipe
from recipe_parts import EXPERTS, MROPE, PATCHES_14, QWEN3_5, SQUARES, TEXT

QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
QWEN_TOKENS |= {"vision_end_token_id": "<|vision_end|>"}
QWEN3_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 100, "out_hidden_size": 128, "patch_size": 16}
QWEN3_VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
QWEN2_VISION = {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 128}
QWEN2_5_VISION = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1],
}

QWEN: dict[str, Recipe] = {
    "Qwen2-VL": Recipe(
        "qwen2_vl",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN2_VISION},
        PATCHES_14,
        token_ids=QWEN_TOKENS,
        other_names=qwen2_newer,
        size=(56, 84),
    ),
    "Qwen2.5-VL": Recipe(
        "qwen2_5_vl",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN2_5_VISION},
        PATCHES_14,
        token_ids=QWEN_TOKENS,
        other_names=qwen2_newer,
        size=(56, 84),
    ),
    "Qwen3-VL": Recipe(
        "qwen3_vl",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN3_VISION},
        SQUARES,
        token_ids=QWEN_TOKENS,
    ),
    "Qwen3.5": Recipe(
        "qwen3_5",
        {
            "text_config": QWEN3_5,
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": []},
        },
        SQUARES,
        token_ids=QWEN_TOKENS,
    ),
    "Qwen3-VL-MoE": Recipe(
        "qwen3_vl_moe",
        {"text_config": {**TEXT, **EXPERTS, "rope_parameters": MROPE}, "vision_config": QWEN3_VISION},
        SQUARES,
        token_ids=QWEN_TOKENS,
        other_form=turned_stacks,
    ),
    "Qwen3.5-MoE": Recipe(
        "qwen3_5_moe",
        {"text_config": {**QWEN3_5, **EXPERTS}, "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": []}},
        SQUARES,
        token_ids=QWEN_TOKENS,
        other_form=stacked,
    ),
}
