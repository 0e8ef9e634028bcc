"""Fixes for Gemma 4's two files: adds a key that llama.cpp's runtime needs, and drops tensors that nothing reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

ARCHITECTURE = "Gemma4ForConditionalGeneration"
# Published checkpoints also have them for layers that share the keys and values of others.
KEYS_AND_VALUES = re.compile(r"\.layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")


def of_gemma4(model_class: Any, hparams: Mapping[str, Any]) -> Any:
    """The package's ``model_class`` with these fixes, for the checkpoint with config.json ``hparams``."""
    methods = _vision(model_class) if model_class.model_type.name == "MMPROJ" else _text(model_class, hparams["text_config"])
    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, **methods})


def _vision(base: Any) -> dict[str, Any]:
    """The tower's feed-forward uses GELU (tanh). Unless the file says so, the runtime uses quick GELU, whose output differs by 0.7 %."""

    def set_gguf_parameters(self: Any) -> None:
        base.set_gguf_parameters(self)
        self.gguf_writer.add_vision_use_gelu(self.hparams_vision.get("hidden_activation", "gelu_pytorch_tanh").startswith("gelu"))

    return {"set_gguf_parameters": set_gguf_parameters}


def _text(base: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out keys and values that neither transformers nor the runtime reads."""
    sharing = settings["num_hidden_layers"] - (settings.get("num_kv_shared_layers") or 0)

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        found = KEYS_AND_VALUES.search(name)
        if found and int(found[1]) >= sharing:
            return []
        kept: Iterable[tuple[str, Any]] = base.modify_tensors(self, tensor, name, layer)
        return kept

    return {"modify_tensors": modify_tensors}
