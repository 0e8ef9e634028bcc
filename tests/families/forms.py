"""Tensor names and layouts of checkpoints that differ from what transformers saves today."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def qwen2_newer(name: str) -> str:
    """Names of Qwen2-VL's and Qwen2.5-VL's tensors as some releases of transformers save them; published ones have those of today."""
    return (
        "model." + (name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)) if "lm_head" not in name else name
    )


def newer(name: str) -> str:
    """Names of tensors as some releases of transformers from 4.52 on save them; published ones have those of today."""
    for old, new in (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")):
        name = name.replace(old, new) if name.startswith(old) else name
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def turned_stacks(tensors: Tensors) -> Tensors:
    """Qwen3-VL-MoE's stacks of experts as published, [experts, columns, rows]."""
    return {name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()}


def stacked(tensors: Tensors) -> Tensors:
    """Qwen3.5-MoE's experts as published, in two stacks a layer, which transformers saves one by one."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for stem in dict.fromkeys(name.partition(".experts.")[0] for name in tensors if ".experts." in name):
        experts = sum(name.startswith(f"{stem}.experts.") and name.endswith("gate_proj.weight") for name in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{stem}.experts.{number}.{matrix}_proj.weight"] for number in range(experts)])
            for matrix in ("gate", "up", "down")
        )
        out |= {f"{stem}.experts.gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}.experts.down_proj": down}
    return out


def older(name: str) -> str:
    """LLaVA's as published, and its tower's."""
    return nested(newer(name)) if name.startswith("vision_tower.") else newer(name)


def nested(name: str) -> str:
    """SigLIP and CLIP towers as published, which transformers saves without the nesting today."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def with_unread(tensors: Tensors) -> Tensors:
    """As published: the layers that take others' keys and values have matrices for their own, which nothing reads."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate_proj.weight") and int(name.split(".layers.")[1].split(".")[0]) >= 3 and "language_model" in name:
            stem = name.removesuffix("mlp.gate_proj.weight") + "self_attn."
            out |= {f"{stem}{matrix}_proj.weight": tensor[:64].clone() for matrix in "kv"} | {
                f"{stem}k_norm.weight": tensor[0, :32].clone()
            }
    return out
