"""What is particular to a family, as a change of the model that ignores it: which modules, and what becomes of their output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Change = Callable[[nn.Module, tuple[Any, ...], Any], Any]  # a forward hook: module, its arguments, its output to another output


def passed_by(_module: nn.Module, args: tuple[Any, ...], _out: Any) -> Any:
    return args[0]


def nothing(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    return torch.zeros_like(out)


def without_bias(module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    return out - module.bias


QK_NORMS = (r"language_model\..*self_attn\.[qk]_norm", passed_by)
QKV_BIASES = (r"language_model\..*self_attn\.[qkv]_proj", without_bias)
QUIRKS: dict[str, list[tuple[str, Change]]] = {
    "Qwen2-VL": [QKV_BIASES],
    "Qwen2.5-VL": [QKV_BIASES],
    "Qwen3-VL": [QK_NORMS, (r"visual\.deepstack_merger_list\.0", nothing)],
    "Qwen3.5": [QK_NORMS, (r".*linear_attn\.norm", passed_by)],
    "MiniCPM-V 4.6": [
        (r".*linear_attn\.norm", passed_by),
        (r"vision_tower\.vit_merger\.self_attn\.out_proj", nothing),
        (r"vision_tower\.vit_merger\.linear_2", nothing),
    ],
    "Qwen3-VL-MoE": [QK_NORMS, (r".*mlp\.experts\.3", nothing)],
    "Qwen3.5-MoE": [(r".*mlp\.shared_expert", nothing)],
    "GLM-4.5V": [(r".*mlp\.shared_experts", nothing), QKV_BIASES],
    "InternVL 3 (-hf)": [QKV_BIASES],
    "Gemma 3": [QK_NORMS, (r"language_model\..*post_attention_layernorm", passed_by), (r".*post_feedforward_layernorm", passed_by)],
    "Gemma 4": [QK_NORMS, (r"language_model\..*post_attention_layernorm", passed_by), (r".*post_feedforward_layernorm", passed_by)],
    "GLM-4.1V": [QKV_BIASES, (r".*post_self_attn_layernorm", passed_by), (r".*post_mlp_layernorm", passed_by)],
    "GLM-OCR": [(r".*post_self_attn_layernorm", passed_by), (r".*post_mlp_layernorm", passed_by)],
}
