"""The families' small checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from forms import nested, newer, older, qwen2_newer, stacked, turned_stacks, with_unread
from mbq_gguf.models.dots_tower import DotsOCR
from mbq_gguf.models.resampler import MiniCPMV
from published import PHI3_TEMPLATE, PHI3_TURNS, dots_ocr, internlm2, internvl, minicpmv, phi3
from recipe import Recipe

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
QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
QWEN_TOKENS |= {"vision_end_token_id": "<|vision_end|>"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
QWEN3_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 100, "out_hidden_size": 128, "patch_size": 16}
QWEN3_VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
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

QWEN2_VISION = {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 128}
QWEN2_5_VISION = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1],
}
PATCHES_14 = SQUARES | {"patch_size": 14}


SIGLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SLOWER = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # of Llama 3's rotary positions
TILED = NORMAL | {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": True}
TILE_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
RESOLUTIONS = [[64, 64], [64, 128], [128, 64], [128, 128], [64, 192], [128, 192], [192, 192]]  # height and width
PIXTRAL_VISION = {"model_type": "pixtral", **SIGLIP, "image_size": 256, "head_dim": 32}
GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
GLM_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128, "patch_size": 14}
GLM_VISION |= {"image_size": 112}
GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>", "<|user|>")
GLM_IDS = {"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>"}
GLM_IDS |= {"image_end_token_id": "<|end_of_image|>"}


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
INTERNVL2 = Recipe(
    "internvl",
    {
        "text_config": {**TEXT, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        "vision_config": {**SIGLIP, "num_hidden_layers": 4, "image_size": [64, 64], "patch_size": [16, 16], "attention_bias": True},
        "image_seq_length": 4,
        "tie_word_embeddings": False,
        "downsample_ratio": 0.5,
    },
    NORMAL | {"size": 64, "image_processor_type": "CLIPFeatureExtractor"},
    specials=("<img>", "</img>", "<IMG_CONTEXT>"),
    token_ids={"image_token_id": "<IMG_CONTEXT>"},
    publish=internvl,
    size=(128, 64),
    sizes=((128, 128), (64, 64)),
)
INTERNLM2 = {"model_type": "llama", "num_attention_heads": 8, "head_dim": 16}
INTERNLM2 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
# Of each pair of channels one scale for texts up to 1024 tokens, and one beyond.
PHI3_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
PHI3_ROPE |= {"short_factor": [1 + 0.1 * pair for pair in range(16)], "long_factor": [1 + 3.0 * pair for pair in range(16)]}
PHI3 = {"model_type": "phi3", "rope_parameters": PHI3_ROPE, "original_max_position_embeddings": 1024, "max_position_embeddings": 8192}


def with_text(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """``recipe`` with other ``settings`` of its language model."""
    return replace(recipe, config=recipe.config | {"text_config": TEXT | settings})


RESAMPLED = Recipe(
    "llava",
    {
        "text_config": {**TEXT, "model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 8},  # two heads of the resampler's 128
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 980, "patch_size": 14},
        "query_num": 16,
    },
    {"max_slice_nums": 9, "scale_resolution": 112, "patch_size": 14},
    specials=("<image>", "</image>", "<slice>", "</slice>", "<unk>"),
    token_ids={"image_token_index": "<unk>"},
    publish=partial(minicpmv, version=2.6),
    model=MiniCPMV,
    size=(224, 112),
    sizes=((98, 126), (112, 500), (336, 224), (300, 30)),
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

RECIPES = {
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
    "InternVL 3 (-hf)": Recipe(
        "internvl",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**SIGLIP, "num_hidden_layers": 4, "image_size": [64, 64], "patch_size": [16, 16]},
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        NORMAL
        | {"size": {"height": 64, "width": 64}, "min_patches": 1, "max_patches": 12, "image_processor_type": "GotOcr2ImageProcessor"},
        specials=("<img>", "</img>", "<IMG_CONTEXT>"),
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        other_names=newer,
        size=(64, 64),
        sizes=((128, 128), (128, 64)),  # llama.cpp has a rule of its own for how many tiles suit another shape
    ),
    "InternVL 2 to 3.5": INTERNVL2,
    "InternVL 2 and 2.5 (InternLM2)": replace(with_text(INTERNVL2, INTERNLM2), pieces=True, publish=internlm2),
    "InternVL 2 (Phi-3)": replace(
        with_text(INTERNVL2, PHI3), pieces=True, specials=(*PHI3_TURNS, *INTERNVL2.specials), template=PHI3_TEMPLATE, publish=phi3
    ),
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
    "MiniCPM-V 4.6": Recipe(
        "minicpmv4_6",
        {
            "text_config": {**QWEN3_5, "model_type": "qwen3_5_text"},
            # llama.cpp takes a table of 70 by 70 positions for granted
            "vision_config": {**SIGLIP, "image_size": 980, "patch_size": 14},
            "insert_layer_id": 1,
        },
        NORMAL | {"patch_size": 14, "scale_resolution": 112, "image_processor_type": "MiniCPMV4_6ImageProcessor"},
        specials=("<image>", "</image>", "<slice>", "</slice>", "<image_pad>"),
        token_ids={"image_token_id": "<image_pad>"},
        size=(112, 112),
        sizes=((224, 112), (336, 224), (100, 40), (300, 30)),
    ),
    "MiniCPM-V 2.6": RESAMPLED,
    "MiniCPM-V 4.5": replace(
        RESAMPLED,
        config=RESAMPLED.config | {"text_config": RESAMPLED.config["text_config"] | {"model_type": "qwen3"}},
        publish=partial(minicpmv, version=4.5),
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
    "LLaVA-1.5": Recipe(
        "llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", **SIGLIP, "num_hidden_layers": 4, "projection_dim": 64},
            "image_seq_length": 16,
        },
        NORMAL | {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "image_processor_type": "CLIPImageProcessor"},
        specials=("<image>",),
        token_ids={"image_token_index": "<image>"},
        other_names=older,
        size=(64, 64),
    ),
    "LLaVA-NeXT": Recipe(
        "llava_next",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {"model_type": "clip_vision_model", **SIGLIP, "num_hidden_layers": 4, "projection_dim": 64},
            "image_grid_pinpoints": RESOLUTIONS[1:],
            "image_seq_length": 16,
        },
        NORMAL
        | {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "image_grid_pinpoints": RESOLUTIONS[1:]}
        | {"image_processor_type": "LlavaNextImageProcessor"},
        specials=("<image>",),
        token_ids={"image_token_index": "<image>"},
        other_names=older,
        size=(192, 100),
        sizes=((100, 160), (500, 300), (61, 64), (30, 200)),
    ),
    "LLaVA-OneVision": Recipe(
        "llava_onevision",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            # a tile is 4 by 4 patches, and 8 pixels that no patch has
            "vision_config": {"model_type": "siglip_vision_model", **SIGLIP, "patch_size": 14, "vision_use_head": False},
            "image_grid_pinpoints": RESOLUTIONS,
            "vision_aspect_ratio": "anyres_max_2",
        },
        NORMAL
        | {
            "size": {"height": 64, "width": 64},
            "image_grid_pinpoints": RESOLUTIONS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
        },
        specials=("<image>", "<video>"),
        token_ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        other_names=nested,
        size=(192, 110),
        sizes=((100, 160), (500, 300), (61, 64), (30, 200), (333, 331), (64, 64)),
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
