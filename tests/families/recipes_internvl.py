"""Small checkpoints of InternVL's models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from forms import newer
from published import PHI3_TEMPLATE, PHI3_TURNS, internlm2, internvl, phi3
from recipe import Recipe
from recipe_parts import NORMAL, SIGLIP, TEXT

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


INTERNVL: dict[str, Recipe] = {
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
}
