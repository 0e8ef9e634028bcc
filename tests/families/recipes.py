"""Small random checkpoints of every family, from the classes and configurations of transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_vlm import DEMO

SEED = 0
TOKENS = 1024  # of the demo's vocabulary: a whole one takes seconds to convert
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
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else 'PICTURE' }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a family's small checkpoint is made of.

    ``config`` are the settings of the model type, ``processor`` those of preprocessor_config.json, ``specials`` are added to the demo's
    tokenizer and named in the configuration by ``token_ids``. ``other_names`` renames a key that transformers saves today to that of
    another kind of checkpoint: the published one, where it differs. ``size`` is that of the picture, which neither side has to resize.
    """

    model_type: str
    config: dict[str, Any]
    processor: dict[str, Any]
    specials: tuple[str, ...] = ()
    token_ids: dict[str, str] = field(default_factory=dict)
    template: str = CHATML
    other_names: Callable[[str], str] | None = None
    size: tuple[int, int] = (64, 96)


QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
QWEN_TOKENS |= {"vision_end_token_id": "<|vision_end|>"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
QWEN3_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128, "patch_size": 16}
QWEN3_VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
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


def qwen2_newer(name: str) -> str:
    """Names of Qwen2-VL and Qwen2.5-VL that some releases of transformers have saved; published ones are today's again."""
    return (
        "model." + (name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)) if "lm_head" not in name else name
    )


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
}


def write(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint as transformers saves it today, in bfloat16."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    ids = write_tokenizer(recipe, folder)
    settings = copy.deepcopy(recipe.config)
    settings["text_config"] |= {"vocab_size": max(ids.values()) + 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings |= {name: ids[token] for name, token in recipe.token_ids.items()}
    config = AutoConfig.for_model(recipe.model_type, **settings)
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms and biases, so that what forgets one of them shows; larger linears, so that layers matter beside the residual.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "layers" in name or "blocks" in name:
                parameter.mul_(4)
    model.to(torch.bfloat16).save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe.processor))
    return folder


def write_tokenizer(recipe: Recipe, folder: Path) -> dict[str, int]:
    """The first tokens and merges of the demo's tokenizer, and the recipe's special tokens; returns the id of every token."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    model = tokenizer["model"]
    ids: dict[str, int] = {token: number for token, number in model["vocab"].items() if number < TOKENS}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [merge for merge in merges if "".join(merge) in ids and all(part in ids for part in merge)]
    for token in recipe.specials:
        added = {"id": ids.setdefault(token, len(ids)), "content": token, "special": True}
        tokenizer["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    model["vocab"] = ids
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(recipe.template)
    return ids
