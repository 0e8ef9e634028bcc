"""Writes LLaVA-1.5's vision file: a CLIP tower and a projector. llama.cpp runs it ("mlp"), but its conversion supports only Pixtral's
tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mbq_gguf.errors import UserError

CLIP = "clip_vision_model"
# The runtime's names for the projector's linears; the package would number them from 1.
PROJECTOR = {"multi_modal_projector.linear_1.": "mm.0.", "multi_modal_projector.linear_2.": "mm.2."}
# Used for the pooled output only, which LLaVA does not read; the runtime would apply it.
POOLED = ("post_layernorm.weight", "post_layernorm.bias")
ACTIVATIONS = ("quick_gelu", "gelu")
Item = tuple[str, Callable[[], Any]]


def clip_class(package: Any) -> Any:
    """A class for the conversion package (its modules ``conversion`` and ``gguf``) that writes LLaVA's CLIP towers."""
    base, gguf = package.conversion.MmprojModel, package.gguf

    def set_gguf_parameters(self: Any) -> None:
        base.set_gguf_parameters(self)
        vision, writer = self.hparams_vision, self.gguf_writer
        activation, layer = vision.get("hidden_act", "quick_gelu"), self.global_config.get("vision_feature_layer", -2)
        if activation not in ACTIVATIONS or not isinstance(layer, int):
            raise UserError(
                f"llama.cpp has no CLIP tower with {activation} whose layer {layer} is read: use a model with {' or '.join(ACTIVATIONS)} "
                "and one such layer"
            )
        if self.global_config.get("vision_feature_select_strategy", "default") != "default":
            raise UserError("llama.cpp drops the class token of a picture, which this model uses: use a model that does not")
        writer.add_clip_projector_type("mlp")
        writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-5))
        writer.add_vision_use_gelu(activation == "gelu")
        writer.add_vision_feature_layers([layer % (self.block_count + 1)])  # the embeddings count as one

    def filter_tensors(cls: Any, item: Item) -> Item | None:
        name, get = item
        if not name.startswith(("vision_tower.vision_model.", *PROJECTOR)) or name.endswith("position_ids"):
            return None
        kept: Item | None = base.filter_tensors.__func__(cls, (name, get))
        return kept

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        if name.endswith(POOLED):
            return []
        for theirs, ours in PROJECTOR.items():
            if name.startswith(theirs):
                return [(name.replace(theirs, ours), tensor)]
        found: Iterable[tuple[str, Any]] = base.modify_tensors(self, tensor, name, layer)
        return found

    def tensor_force_quant(self: Any, name: str, new_name: str, layer: int | None, dimensions: int) -> Any:
        if ".position_embd." in new_name:
            return gguf.GGMLQuantizationType.F32
        return base.tensor_force_quant(self, name, new_name, layer, dimensions)

    methods = {function.__name__: function for function in (set_gguf_parameters, modify_tensors, tensor_force_quant)}
    own = {"model_arch": base.model_arch, "filter_tensors": classmethod(filter_tensors)}
    return type("ClipVisionModel", (base,), {**own, **methods})
