"""Small checkpoints of GLM's models."""

from __future__ import annotations

from recipe import Recipe
from recipe_parts import EXPERTS, PATCHES_14, TEXT

GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
GLM_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128, "patch_size": 14}
GLM_VISION |= {"image_size": 112}
GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>", "<|user|>")
GLM_IDS = {"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>"}
GLM_IDS |= {"image_end_token_id": "<|end_of_image|>"}

GLM: dict[str, Recipe] = {
    "GLM-4.5V": Recipe(
        "glm4v_moe",
        {
            "text_config": {**TEXT, **EXPERTS, "n_routed_experts": 6, "first_k_dense_replace": 1, "rope_parameters": GLM_ROPE},
            "vision_config": GLM_VISION,
        },
        PATCHES_14 | {"image_processor_type": "Glm46VImageProcessor"},
        specials=(*GLM_TOKENS, "[gMASK]", "<|endoftext|>", "<|observation|>"),
        token_ids=GLM_IDS,
        size=(56, 84),
    ),
    "GLM-4.1V": Recipe(
        "glm4v",
        {"text_config": {**TEXT, "rope_parameters": GLM_ROPE}, "vision_config": GLM_VISION},
        PATCHES_14 | {"image_processor_type": "Glm4vImageProcessor"},
        specials=GLM_TOKENS,
        token_ids=GLM_IDS,
        size=(56, 84),
    ),
    "GLM-OCR": Recipe(
        "glm_ocr",
        {"text_config": {**TEXT, "rope_parameters": GLM_ROPE}, "vision_config": GLM_VISION},
        PATCHES_14 | {"image_processor_type": "Glm46VImageProcessor"},
        specials=GLM_TOKENS,
        token_ids=GLM_IDS,
        size=(56, 84),
    ),
}
