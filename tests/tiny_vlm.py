"""A small random Qwen2-VL on disk: real code paths in a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

DEMO = Path(__file__).parents[1] / "converter" / "mbq_gguf" / "demo" / "data"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json")
LAYERS = 3


def write_tiny_vlm(directory: Path, seed: int = 0) -> Path:
    """Save a Qwen2-VL of 3 layers, width 128, 4 heads over 2 key/value heads, feed-forward 192, in bfloat16, tied embeddings."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(DEMO))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 192, LAYERS
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.layer_types = text.layer_types[:LAYERS]
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    # llama.cpp's conversion takes the 2 in merger.mlp.2 for a layer's number: three layers are the least that it converts.
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = 3, 32, 2, 128
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms and biases, so that folding into them shows; larger linears, so that layers matter beside the residual.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "layers" in name:
                parameter.mul_(4)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(str(directory))
    for file in PROCESSOR_FILES:
        shutil.copy(DEMO / file, directory / file)
    return directory
