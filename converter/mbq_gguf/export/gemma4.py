"""Gemma 4's vision file, of which llama.cpp's conversion says less than its runtime asks."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "Gemma4ForConditionalGeneration"


def of_gemma4(model_class: Any) -> Any:
    """``model_class`` of the conversion package."""
    methods = _vision(model_class) if model_class.model_type.name == "MMPROJ" else {}
    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, **methods})


def _vision(base: Any) -> dict[str, Any]:
    """The tower's feed-forward has a GELU (its tanh form), as the runtime's has where the file says so; else a quick one, 0.7 % off."""

    def set_gguf_parameters(self: Any) -> None:
        base.set_gguf_parameters(self)
        self.gguf_writer.add_vision_use_gelu(self.hparams_vision.get("hidden_activation", "gelu_pytorch_tanh").startswith("gelu"))

    return {"set_gguf_parameters": set_gguf_parameters}
