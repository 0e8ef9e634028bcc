"""Small checkpoints of LLaVA's models."""

from __future__ import annotations

from forms import nested, older
from recipe import Recipe
from recipe_parts import NORMAL, SIGLIP, TEXT

RESOLUTIONS = [[64, 64], [64, 128], [128, 64], [128, 128], [64, 192], [128, 192], [192, 192]]  # height and width

LLAVA: dict[str, Recipe] = {
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
}
