"""Small checkpoints of families with one or two models."""

from __future__ import annotations

from forms import newer
from mbq_gguf.models.dots_tower import DotsOCR
from published import dots_ocr
from recipe import Recipe
from recipe_parts import MROPE, NORMAL, SIGLIP, TEXT

SLOWER = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # of Llama 3's rotary positions
TILED = NORMAL | {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": True}
TILE_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
PIXTRAL_VISION = {"model_type": "pixtral", **SIGLIP, "image_size": 256, "head_dim": 32}

OTHERS: dict[str, Recipe] = {
    "Llama 4": Recipe(
        "llama4",
        {
            # llama.cpp takes every fourth layer for one without rotary positions; of five every second one has experts
            "text_config": {**TEXT, "num_hidden_layers": 5, "intermediate_size_mlp": 384, "interleave_moe_layer_step": 2}
            | {"num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 2}
            | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **SLOWER}},
            "vision_config": {**SIGLIP, "num_attention_heads": 2, "vision_output_dim": 96, "projector_input_dim": 96}
            | {"projector_output_dim": 96, "intermediate_size": 256},
        },
        NORMAL | {"size": {"height": 64, "width": 64}, "image_processor_type": "Llama4ImageProcessor"},
        specials=("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        token_ids={"image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"},
        size=(128, 64),
        sizes=((100, 160), (500, 300), (61, 64), (30, 200), (333, 331), (64, 64), (1100, 40)),
    ),
    "SmolVLM": Recipe(
        "smolvlm",
        {
            "text_config": {**TEXT, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "vision_config": {**SIGLIP, "size": {"longest_edge": 64}},
            "scale_factor": 2,
        },
        TILED | {"image_processor_type": "SmolVLMImageProcessor"},
        specials=TILE_TOKENS,
        token_ids={"image_token_id": "<image>"},
        size=(128, 64),
    ),
    "Idefics3": Recipe(
        "idefics3",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**SIGLIP, "size": {"longest_edge": 64}}, "scale_factor": 2},
        TILED | {"image_processor_type": "Idefics3ImageProcessor"},
        specials=TILE_TOKENS,
        token_ids={"image_token_id": "<image>"},
        size=(128, 64),
    ),
    "Mistral 3": Recipe(
        "mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": PIXTRAL_VISION,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        NORMAL | {"size": {"longest_edge": 256}, "patch_size": 16, "image_processor_type": "PixtralImageProcessor"},
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        token_ids={"image_token_index": "[IMG]"},
        other_names=newer,
        size=(160, 96),
    ),
    "Pixtral": Recipe(
        "llava",
        {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": PIXTRAL_VISION, "vision_feature_layer": -1}
        | {"vision_feature_select_strategy": "full"},
        NORMAL | {"size": {"longest_edge": 256}, "patch_size": 16, "image_processor_type": "PixtralImageProcessor"},
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        token_ids={"image_token_index": "[IMG]"},
        other_names=newer,
        size=(64, 48),
        sizes=((64, 160), (192, 128)),  # others are rounded up by transformers and to the nearest by llama.cpp
    ),
    "dots.ocr": Recipe(
        "qwen2",
        {
            "text_config": TEXT,
            "vision_config": {"embed_dim": 128, "hidden_size": 128, "intermediate_size": 176, "num_hidden_layers": 3, "patch_size": 14}
            | {"num_attention_heads": 4, "num_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 1, "rms_norm_eps": 1e-5}
            | {"use_bias": False, "post_norm": True, "is_causal": False},
        },
        NORMAL
        | {"patch_size": 14, "temporal_patch_size": 1, "merge_size": 2, "min_pixels": 3136, "max_pixels": 50176}
        | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "DotsVLProcessor"},
        specials=("<|img|>", "<|endofimg|>", "<|imgpad|>"),
        token_ids={"image_token_id": "<|imgpad|>"},
        publish=dots_ocr,
        model=DotsOCR,
        flat=True,
        size=(56, 84),
    ),
    "PaddleOCR-VL": Recipe(
        "paddleocr_vl",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": {**SIGLIP, "image_size": 70, "patch_size": 14}},
        # a table of 5 by 5 positions, which shrinks one way and grows the other for the picture's 4 by 6 patches
        NORMAL
        | {"patch_size": 14, "temporal_patch_size": 1, "merge_size": 2, "min_pixels": 3136, "max_pixels": 50176}
        | {"image_processor_type": "PaddleOCRVLImageProcessor"},
        specials=("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"),
        token_ids={"image_token_id": "<|IMAGE_PLACEHOLDER|>", "vision_start_token_id": "<|IMAGE_START|>"}
        | {"vision_end_token_id": "<|IMAGE_END|>"},
        pieces=True,
        size=(56, 84),
    ),
}
