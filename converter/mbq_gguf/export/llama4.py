"""Fixes for Llama 4's two files: checks settings that llama.cpp hard-codes, and corrects a norm that its conversion misnames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mbq_gguf.errors import UserError

# Attention chunks, and temperature tuning of queries in layers without rotary positions.
FIXED = {"attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1}
NO_ROPE_STEP = 4  # every fourth layer has no rotary positions
UNNORMED = 128  # models with this many experts do not normalise queries and keys
BEFORE_MLP = ".post_attention_layernorm."  # the tower's name for the norm before its MLP


def of_llama4(model_class: Any, hparams: Mapping[str, Any]) -> Any:
    """The package's ``model_class`` with these fixes, for the checkpoint with config.json ``hparams``.

    Raises UserError for settings that the runtime does not support.
    """
    if model_class.model_type.name == "TEXT":
        check_settings(hparams["text_config"])
        return model_class

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        """The package mistakes it for a norm after attention, as in Gemma 4; features would then be wrong by 0.58 of their size."""
        if BEFORE_MLP in name:
            return [(f"v.blk.{layer}.ln2.{name.rpartition('.')[2]}", tensor)]
        kept: Iterable[tuple[str, Any]] = model_class.modify_tensors(self, tensor, name, layer)
        return kept

    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, "modify_tensors": modify_tensors})


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError if ``settings``, the text_config of a config.json, differ from those that llama.cpp hard-codes."""
    layers, step = settings["num_hidden_layers"], settings.get("interleave_moe_layer_step", 1)
    expected = FIXED | {
        "no_rope_layers": [int((layer + 1) % NO_ROPE_STEP != 0) for layer in range(layers)],
        "use_qk_norm": settings.get("num_local_experts", 16) != UNNORMED,
        "moe_layers": list(range(step - 1, layers, step)),
        "attention_bias": False,
    }
    for name, value in expected.items():
        found = settings.get(name)
        if found in (None, []):  # published configurations leave lists to the class
            continue
        if (bool(found) if isinstance(value, bool) else found) != value:
            raise UserError(f"llama.cpp assumes {name} {value} for Llama 4, and this model has {found}: use a model with that value")
