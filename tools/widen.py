"""Widens the reference VLM from 576 to 768 channels without changing what it computes, so that K-quants can store every row.

    python tools/widen.py reference-vlm wide-vlm

Three channels and a zero become four by a 4 x 4 Hadamard matrix, x' = E x with E^T E = 1: every weight is used, and outliers keep their
place. Norm weights are folded into the matrices after them, so the output head is a separate matrix. The mean of squares falls to three
quarters; epsilon is scaled in the same way, and the matrices after a norm by the square root. Attention gets a fourth key and value head
and its three query heads, all zero.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

# Three columns of a Hadamard matrix.
THREE_TO_FOUR = torch.tensor([[1, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]], dtype=torch.float64) / 2
SHARE = 3 / 4  # of the mean of squares that is left when a quarter of the channels is new
Tensors = dict[str, torch.Tensor]


def read_wide(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(rows, 576) after a norm -> (rows, 768) after one without weights."""
    scaled = weight.double() * norm.double() * SHARE**0.5
    return (scaled.unflatten(1, (-1, 3)) @ THREE_TO_FOUR.T).flatten(1)


def write_wide(weight: torch.Tensor) -> torch.Tensor:
    """(576, ...) that adds to the residual stream -> (768, ...)."""
    return torch.einsum("fc,gc...->gf...", THREE_TO_FOUR, weight.double().unflatten(0, (-1, 3))).flatten(0, 1)


def with_zeros(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Append zeros along ``dim``, a third of its length: the new heads."""
    return torch.cat([tensor.double(), torch.zeros_like(tensor.narrow(dim, 0, tensor.shape[dim] // 3)).double()], dim)


def widen_layer(old: Tensors, prefix: str) -> Tensors:
    """The tensors of the decoder layer whose names start with ``prefix``."""
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    before_attention, before_mlp = f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"
    new = {name: torch.ones(len(old[name]) * 4 // 3) for name in (before_attention, before_mlp)}
    for projection in ("q_proj", "k_proj", "v_proj"):
        new[f"{attention}{projection}.weight"] = with_zeros(read_wide(old[f"{attention}{projection}.weight"], old[before_attention]))
        new[f"{attention}{projection}.bias"] = with_zeros(old[f"{attention}{projection}.bias"])
    new[f"{attention}o_proj.weight"] = with_zeros(write_wide(old[f"{attention}o_proj.weight"]), dim=1)
    for projection in ("gate_proj", "up_proj"):
        new[f"{mlp}{projection}.weight"] = read_wide(old[f"{mlp}{projection}.weight"], old[before_mlp])
    new[f"{mlp}down_proj.weight"] = write_wide(old[f"{mlp}down_proj.weight"])
    return new


def widen(old: Tensors, layers: int) -> Tensors:
    """All tensors of the wide model, in bfloat16."""
    embeddings, projector = "model.embed_tokens.weight", "visual.merger.mlp.2."
    new = dict(old)
    for layer in range(layers):
        new |= widen_layer(old, f"model.layers.{layer}.")
    new["lm_head.weight"] = read_wide(old[embeddings], old["model.norm.weight"])
    new["model.norm.weight"] = torch.ones(len(old["model.norm.weight"]) * 4 // 3)
    new[embeddings] = write_wide(old[embeddings].T).T
    new |= {f"{projector}{name}": write_wide(old[f"{projector}{name}"]) for name in ("weight", "bias")}
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in new.items()}


def widen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the wide model."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    for part, key in ((text, "hidden_size"), (text, "num_attention_heads"), (text, "num_key_value_heads"), (vision, "hidden_size")):
        part[key] = part[key] * 4 // 3
    text |= {"rms_norm_eps": text["rms_norm_eps"] * SHARE, "tie_word_embeddings": False}
    return config | {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(model: Path, out: Path) -> None:
    """Write the reference VLM in MODEL (from `mbq-gguf demo-model`), widened, to the folder OUT."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for path in model.glob("*.j*"):
        shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps(widen_config(config), indent=2) + "\n", encoding="utf-8")
    tensors = widen(load_file(model / "model.safetensors"), config["text_config"]["num_hidden_layers"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
