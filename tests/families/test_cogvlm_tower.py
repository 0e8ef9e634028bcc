"""CogVLM's tower in the patched llama.cpp against EVA2-CLIP as published (visual.py): the class token comes first and is dropped.

The converter refuses CogVLM, for its decoder; upstream's conversion writes the vision file here. That says nothing of the tower's GELU, so
the reference has the runtime's quick one. Costs a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from PIL import Image
from safetensors.torch import save_file
from small import moved
from tokens import plain
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

WIDTH, FEED, HEADS, TEXT, SIDE, PATCH = 64, 96, 2, 128, 56, 14
LAYERS = 3
VISION = "model.vision."
LIMIT = 0.005  # in root mean square, as for the families' towers; measured: 0.0016, and 0.126 with the class token behind
Tensors = dict[str, torch.Tensor]


def checkpoint(folder: Path) -> Tensors:
    """A small random CogVLM in ``folder``; its tensors."""
    vision = {"hidden_size": WIDTH, "intermediate_size": FEED, "num_hidden_layers": LAYERS, "num_heads": HEADS, "patch_size": PATCH}
    config = {"architectures": ["CogVLMForCausalLM"], "hidden_size": TEXT, "vision_config": vision | {"image_size": SIDE}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"{VISION}transformer.layers.{number}." for number in range(LAYERS)):
        linears = {"attention.query_key_value": (3 * WIDTH, WIDTH), "attention.dense": (WIDTH, WIDTH), "mlp.fc1": (FEED, WIDTH)}
        for name, shape in (linears | {"mlp.fc2": (WIDTH, FEED)}).items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        shapes |= {f"{layer}{norm}_layernorm.{end}": (WIDTH,) for norm in ("input", "post_attention") for end in ("weight", "bias")}
    entry, end = f"{VISION}patch_embedding.", f"{VISION}linear_proj."
    shapes |= {f"{entry}cls_embedding": (1, WIDTH), f"{entry}position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, WIDTH)}
    shapes |= {f"{entry}proj.weight": (WIDTH, 3, PATCH, PATCH), f"{entry}proj.bias": (WIDTH,)}
    shapes |= {f"{end}linear_proj.weight": (TEXT, WIDTH), f"{end}norm1.weight": (TEXT,), f"{end}norm1.bias": (TEXT,)}
    shapes |= {
        f"{end}dense_h_to_4h.weight": (FEED, TEXT),
        f"{end}gate_proj.weight": (FEED, TEXT),
        f"{end}dense_4h_to_h.weight": (TEXT, FEED),
    }
    shapes |= {f"{VISION}boi": (1, 1, TEXT), f"{VISION}eoi": (1, 1, TEXT)}
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) / (8 if len(shape) == 2 else 4) for name, shape in shapes.items()}
    tensors |= {name: 1 + tensor for name, tensor in tensors.items() if "norm" in name and name.endswith("weight")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def language_model(folder: Path) -> Path:
    """One of CogVLM's width: its own cannot be converted, since upstream's conversion leaves out what has "vision_" in its name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = max(plain((), folder).values()) + 1
    config = LlamaConfig(vocab_size=tokens, hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def tower(tensors: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    """What EVA2-CLIP and the projector make of ``pixels`` [1, 3, side, side]: begin, patches, end [patches + 2, text width]."""

    def weights(name: str) -> list[torch.Tensor | None]:
        return [tensors[f"{VISION}{name}.weight"], tensors.get(f"{VISION}{name}.bias")]

    patches = conv2d(pixels, *weights("patch_embedding.proj"), stride=PATCH).flatten(2)[0].t()
    hidden = torch.cat([tensors[f"{VISION}patch_embedding.cls_embedding"], patches])
    hidden = hidden + tensors[f"{VISION}patch_embedding.position_embedding.weight"]
    for layer in (f"transformer.layers.{number}." for number in range(LAYERS)):
        parts = linear(hidden, *weights(f"{layer}attention.query_key_value")).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        mixed = scaled_dot_product_attention(*parts.unsqueeze(1))[0].transpose(0, 1).flatten(1)
        written = linear(mixed, *weights(f"{layer}attention.dense"))
        hidden = hidden + layer_norm(written, (WIDTH,), *weights(f"{layer}input_layernorm"), eps=1e-6)
        inner = linear(hidden, *weights(f"{layer}mlp.fc1"))
        written = linear(inner * torch.sigmoid(1.702 * inner), *weights(f"{layer}mlp.fc2"))
        hidden = hidden + layer_norm(written, (WIDTH,), *weights(f"{layer}post_attention_layernorm"), eps=1e-6)
    seen = linear(hidden[1:], *weights("linear_proj.linear_proj"))
    seen = gelu(layer_norm(seen, (TEXT,), *weights("linear_proj.norm1"), eps=1e-5), approximate="tanh")
    seen = silu(linear(seen, *weights("linear_proj.gate_proj"))) * linear(seen, *weights("linear_proj.dense_h_to_4h"))
    seen = linear(seen, *weights("linear_proj.dense_4h_to_h"))
    return torch.cat([tensors[f"{VISION}boi"][0], seen, tensors[f"{VISION}eoi"][0]])


@pytest.mark.usefixtures("built_llama")
def test_the_class_token_comes_first(tmp_path: Path) -> None:
    (folder := tmp_path / "checkpoint").mkdir()
    (other := tmp_path / "language-model").mkdir()
    tensors = checkpoint(folder)
    picture = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    files, rest = (tmp_path / "text.gguf", tmp_path / "mmproj.gguf"), {"quantised": {}, "replaced": {}, "metadata": {}}
    write_text_gguf(language_model(other), files[0], base_type="F16", embedding_type="F16", file_type=None, **rest)
    write_mmproj_gguf(folder, files[1], mmproj_type="F32")
    with Model(*files, context=512, threads=1) as model:
        ours = np.concatenate(model.vision.encode(tmp_path / "picture.png").embeddings)
    pixels = (torch.from_numpy(picture).float() / 255 - 0.5) / 0.5
    assert moved(ours, tower(tensors, pixels.permute(2, 0, 1)[None]).numpy()) <= LIMIT
