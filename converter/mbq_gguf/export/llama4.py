"""Llama 4's two files: settings that llama.cpp takes for granted, of which no file tells it, and a norm that its conversion misplaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mbq_gguf.errors import UserError

# Chunks of attention, and how queries of layers without rotary positions grow with their position.
FIXED = {"attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1}
NO_ROPE_STEP = 4  # every fourth layer has no rotary positions
UNNORMED = 128  # so many experts have the models whose queries and keys are not normalised
BEFORE_MLP = ".post_attention_layernorm."  # what the tower calls the norm before its MLP


def of_llama4(model_class: Any, hparams: Mapping[str, Any]) -> Any:
    """``model_class`` of the conversion package, for the checkpoint whose config.json is ``hparams``.

    Raises UserError for settings that the runtime does not have.
    """
    if model_class.model_type.name == "TEXT":
        check_settings(hparams["text_config"])
        return model_class

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        """The package takes the norm for one behind attention, as Gemma 4's of this name is: features 0.58 of their size off."""
        if BEFORE_MLP in name:
            return [(f"v.blk.{layer}.ln2.{name.rpartition('.')[2]}", tensor)]
        kept: Iterable[tuple[str, Any]] = model_class.modify_tensors(self, tensor, name, layer)
        return kept

    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, "modify_tensors": modify_tensors})


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError where ``settings``, the text_config of a config.json, are others."""
    layers, step = settings["num_hidden_layers"], settings.get("interleave_moe_layer_step", 1)
    expected = FIXED | {
        "no_rope_layers": [int((layer + 1) % NO_ROPE_STEP != 0) for layer in range(layers)],
        "use_qk_norm": settings.get("num_local_experts", 16) != UNNORMED,
        "moe_layers": list(range(step - 1, layers, step)),
        "attention_bias": False,
    }
    for name, value in expected.items():
        found = settings.get(name)
        if found in (None, []):  # published ones leave lists to the class
            continue
        if (bool(found) if isinstance(value, bool) else found) != value:
            raise UserError(f"llama.cpp takes Llama 4's {name} for {value}, and this model has {found}: use a model that has the same")
