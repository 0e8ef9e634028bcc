"""Writes vision files of LLaVA-NeXT and LLaVA-OneVision, which llama.cpp's conversion does not support. Only the patched runtime supports
their tiles (clip-mbq-anyres.h).

The file has a CLIP or SigLIP tower up to the layer that is used, a projector of two linears, the newline embedding after each row of a
picture's tiles, the resolutions for tiling, and the maximum number of tokens (OneVision).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.export.clip_tower import clip_class
from mbq_gguf.models.pictures import most_tiles

ARCHITECTURES = ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
PROJECTOR_TYPE = "mbq_anyres"  # of clip-impl.h
MAX_TILES = "clip.vision.preproc_max_tiles"
NEWLINE = "image_newline"
# Activations in the runtime: True for GELU (tanh), False for quick GELU.
GELU = {"gelu": True, "gelu_pytorch_tanh": True, "quick_gelu": False}
Item = tuple[str, Callable[[], Any]]


def anyres_class(package: Any) -> Any:
    """A class of the conversion package (its modules ``conversion`` and ``gguf``) that writes these vision files."""
    base, clip = package.conversion.MmprojModel, clip_class(package)

    def set_gguf_parameters(self: Any) -> None:
        vision, settings, writer = self.hparams_vision, self.global_config, self.gguf_writer
        check(settings)
        vision["num_hidden_layers"] = layers_read(settings, self.block_count)
        base.set_gguf_parameters(self)
        writer.add_clip_projector_type(PROJECTOR_TYPE)
        writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-5 if "projection_dim" in vision else 1e-6))
        writer.add_vision_use_gelu(GELU[activation(vision)])
        resolutions = settings.get("image_grid_pinpoints") or self.preprocessor_config["image_grid_pinpoints"]
        writer.add_vision_image_grid_pinpoints([edge for height, width in resolutions for edge in (width, height)])
        if "vision_aspect_ratio" in settings:
            writer.add_uint32(MAX_TILES, most_tiles(settings["vision_aspect_ratio"]))

    def filter_tensors(cls: Any, item: Item) -> Item | None:
        name, get = item
        kept: Item | None = (name, get) if name == NEWLINE else clip.filter_tensors.__func__(cls, (name, get))
        return kept

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        if name == NEWLINE:
            return [(f"v.{name}", tensor)]
        if ".head." in name or (layer is not None and layer >= layers_read(self.global_config, self.block_count)):
            return []
        found: Iterable[tuple[str, Any]] = clip.modify_tensors(self, tensor, name, layer)
        return found

    methods = {function.__name__: function for function in (set_gguf_parameters, modify_tensors)}
    return type("AnyresVisionModel", (clip,), {"model_arch": base.model_arch, "filter_tensors": classmethod(filter_tensors), **methods})


def activation(vision: dict[str, Any]) -> str:
    """The tower's activation; the default of CLIP or SigLIP if none is named."""
    return str(vision.get("hidden_act", "quick_gelu" if vision.get("model_type") == "clip_vision_model" else "gelu_pytorch_tanh"))


def layers_read(settings: dict[str, Any], layers: int) -> int:
    """The number of the tower's ``layers`` that the projector uses; ``vision_feature_layer`` also counts the embeddings."""
    layer = settings.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"llama.cpp does not support a tower of which several layers are used ({layer}): use a model that uses one")
    return layer % (layers + 1)


def check(settings: dict[str, Any]) -> None:
    """Raise UserError if the runtime would process pictures differently than the model was trained with."""
    vision = settings["vision_config"]
    if activation(vision) not in GELU:
        raise UserError(f"llama.cpp does not support a tower with {activation(vision)}: use a model with {' or '.join(GELU)}")
    if settings.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(f"llama.cpp does not support a projector with {settings['projector_hidden_act']}: use a model with gelu")
    whole = settings.get("vision_feature_select_strategy", "default") == "full"
    if whole == (vision.get("model_type") == "clip_vision_model"):
        raise UserError("llama.cpp drops exactly a tower's class token from a picture: use a model that does so")
