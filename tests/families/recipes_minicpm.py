"""Small checkpoints of MiniCPM-V."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mbq_gguf.models.resampler import MiniCPMV
from published import minicpmv
from recipe import Recipe
from recipe_parts import NORMAL, QWEN3_5, SIGLIP, TEXT

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

MINICPM: dict[str, Recipe] = {
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
}
