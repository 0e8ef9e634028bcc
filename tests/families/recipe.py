"""How a family's small random checkpoint is made from the classes and configurations of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forms import Tensors
from tokens import pieces, plain, spaced

SEED = 0
HELD = ("layer_scalar", "std_bias", "std_scale", "e_score_correction_bias")  # buffers that a checkpoint holds
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else 'PICTURE' }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a family's small checkpoint is made of.

    ``config`` are the settings of the model type, ``processor`` those of preprocessor_config.json, ``specials`` are added to the demo's
    tokenizer (``spaced``: one of Gemma's kind,
    ``pieces``: that with a tokenizer.model) and named in the configuration by ``token_ids``. ``other_names`` renames a key that
    transformers saves today to that of another kind of checkpoint: the published one, where it differs; ``other_form`` makes its tensors.
    ``publish`` makes of the checkpoint one that only its authors' code reads; ``model`` makes the model where transformers has no class of
    it, ``flat`` has the language model's settings beside the others. ``size`` is that of the picture, which neither side has to resize but
    to slice it; pictures of ``sizes`` must take as many tokens on both.
    """

    model_type: str
    config: dict[str, Any]
    processor: dict[str, Any]
    specials: tuple[str, ...] = ()
    token_ids: dict[str, str] = field(default_factory=dict)
    template: str = CHATML
    spaced: bool = False
    pieces: bool = False
    other_names: Callable[[str], str] | None = None
    other_form: Callable[[Tensors], Tensors] | None = None
    publish: Callable[[Path], None] | None = None
    model: Callable[[Any], Any] | None = None
    flat: bool = False
    size: tuple[int, int] = (64, 96)
    sizes: tuple[tuple[int, int], ...] = ((100, 160), (192, 128))


def write(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint as transformers saves it today, in bfloat16."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    write_tokenizer = pieces if recipe.pieces else spaced if recipe.spaced else plain
    ids = write_tokenizer(recipe.specials, folder)
    (folder / "chat_template.jinja").write_text(recipe.template)
    settings = copy.deepcopy(recipe.config)
    size = max(ids.values()) + 1
    text = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2} | settings["text_config"]
    settings["text_config"] = text | ({"vocab_size_per_layer_input": size} if text.get("hidden_size_per_layer_input") else {})
    settings |= {name: ids[token] for name, token in recipe.token_ids.items()}
    if recipe.flat:
        settings |= settings.pop("text_config")
    config = AutoConfig.for_model(recipe.model_type, **settings)
    torch.manual_seed(SEED)
    model = recipe.model(config) if recipe.model else AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms and biases, so that what forgets one of them shows; larger linears, so that layers matter beside the residual.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
                if name.endswith("q_norm.weight") and settings["text_config"].get("num_kv_shared_layers"):
                    parameter.mul_(0.4)  # Gemma 4 does not scale scores: keys chosen so sharply, by more layers, turn with any rounding
            elif "layers" in name or "blocks" in name:
                parameter.mul_(4)
            elif "resampler.attn.in_proj" in name:  # MiniCPM-V's, which would attend to all patches alike
                parameter.mul_(3)
            elif "visual.vision_model.embeddings.position" in name:  # PaddleOCR-VL's, which would not show in its features
                parameter.mul_(20)
            elif not parameter.any():  # Gemma 3's projector, behind which nothing would show
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(HELD):
                buffer.copy_(1 + 0.3 * torch.randn_like(buffer))
            elif name.endswith(("_min", "_max")) and buffer.ndim == 0:  # of clipped linears
                buffer.copy_((2 + 0.3 * torch.randn_like(buffer)) * (1 if name.endswith("_max") else -1))
    model.to(torch.bfloat16).save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe.processor))
    if recipe.publish:
        recipe.publish(folder)
    return folder
