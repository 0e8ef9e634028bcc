#!/usr/bin/env python3
"""Writes a model directory with random weights in the shapes of a published model, one shard per decoder layer, to measure time and memory.

    python tools/random_model.py qwen2-vl-7b big --layers 4
    python tools/random_model.py qwen2-vl-72b huge          (145 GB)

Tokenizer, image processor and chat template are the reference VLM's. Its vocabulary is smaller, so the remaining rows are padding. All
layers have the same matrices, so that making them takes no longer than writing them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mbq_gguf.demo.assemble import DATA
from safetensors.torch import save_file

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json")
SPREAD = 0.02  # standard deviation of the weights, as models are initialised; norms are 1, biases 0
LAYER = re.compile(r"language_model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-VL: decoder layers, channels, feed-forward width, heads, key/value heads; blocks and channels of the tower."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    depth: int = 32
    tower: int = 1280
    tower_heads: int = 16
    vocabulary: int = 152064


SHAPES = {
    "qwen2-vl-7b": Shape(28, 3584, 18944, 28, 4),
    "qwen2-vl-72b": Shape(80, 8192, 29568, 64, 8),
    "small": Shape(8, 1024, 2816, 8, 2, depth=3, tower=320, tower_heads=5, vocabulary=49152),
}


def outlined(shape: Shape, layers: int) -> Any:
    """The model of ``shape`` with that many ``layers``, without weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(DATA))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = shape.width, shape.ffn, layers
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.layer_types, text.vocab_size = ["full_attention"] * layers, shape.vocabulary
    half = shape.width // shape.heads // 2
    text.rope_parameters["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config.tie_word_embeddings = text.tie_word_embeddings = False
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = shape.depth, shape.tower, shape.tower_heads, shape.width
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def random_tensor(name: str, like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Values for the parameter ``name`` with the shape of ``like``, bfloat16."""
    if like.ndim == 1:
        return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    made = torch.empty(like.shape, dtype=torch.bfloat16, device=draw.device)
    return made.normal_(0.0, SPREAD, generator=draw).cpu()


def shards(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each file: first everything but the layers, then one layer per file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for name, parameter in model.state_dict().items():
        found = LAYER.search(name)
        by_layer.setdefault(int(found[1]) if found else -1, {})[name] = parameter
    yield {name: random_tensor(name, like, draw) for name, like in by_layer.pop(-1).items()}
    made = {name: random_tensor(name, like, draw) for name, like in by_layer[0].items()}
    for number in by_layer:
        yield {LAYER.sub(f"language_model.layers.{number}.", name): value for name, value in made.items()}


def write(shape: Shape, layers: int, out: Path) -> None:
    """Write the whole directory."""
    out.mkdir(parents=True, exist_ok=True)
    model = outlined(shape, layers)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(out))
    for file in PROCESSOR_FILES:
        shutil.copy(DATA / file, out / file)
    names: dict[str, str] = {}
    for number, tensors in enumerate(shards(model)):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        click.echo(file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Number of decoder layers (default: all).")
def main(shape: str, out: Path, layers: int | None) -> None:
    """Write a model of SHAPE to the folder OUT."""
    write(SHAPES[shape], layers or SHAPES[shape].layers, out)


if __name__ == "__main__":
    main()
