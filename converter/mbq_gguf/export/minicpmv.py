"""Classes for llama.cpp's conversion package that write MiniCPM-V 2.6 and 4.5; llama.cpp itself uses scripts and a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from mbq_gguf.models import minicpmv

MODEL = "model."
LANGUAGE_MODEL = "llm."
VISION = ("vpm.", "resampler.")
PLACES = "resampler.pos_embed_k"
QUERY = "resampler.query"
FLOATS = (PLACES, QUERY, "v.position_embd.weight")  # not used in products
Item = tuple[str, Callable[[], Any]]


def text_class(package: Any, version: str) -> Any:
    """The class for the language model of ``version``, which accepts the published tensor names."""
    base = package.conversion.get_model_class(minicpmv.TEXTS[version][1], mmproj=False)

    def filter_tensors(cls: Any, item: Item) -> Item | None:
        name, get = item
        if not name.startswith(LANGUAGE_MODEL):
            return None
        found: Item | None = base.filter_tensors.__func__(cls, (name.removeprefix(LANGUAGE_MODEL), get))
        return found

    return type(base.__name__, (base,), {"model_arch": base.model_arch, "filter_tensors": classmethod(filter_tensors)})


def vision_class(package: Any, version: str) -> Any:
    """A class that writes tower and resampler, with the tensor names of models/resampler.py."""
    base, gguf = package.conversion.MmprojModel, package.gguf

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, *args, **options)
        settings = minicpmv.picture_settings(self.preprocessor_config)
        self.preprocessor_config |= settings
        self.hparams_vision["image_size"] = settings["scale_resolution"]

    def set_gguf_parameters(self: Any) -> None:
        base.set_gguf_parameters(self)
        writer = self.gguf_writer
        writer.add_clip_projector_type("resampler")
        writer.add_vision_use_gelu(True)
        writer.add_vision_attention_layernorm_eps(self.hparams_vision.get("layer_norm_eps", 1e-6))
        writer.add_int32("clip.minicpmv_version", minicpmv.TEXTS[version][2])
        writer.add_uint32("clip.minicpmv_query_num", self.global_config.get("query_num", 64))

    def filter_tensors(cls: Any, item: Item) -> Item | None:
        return item if item[0].startswith(VISION) else None

    def index_tensors(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        names = self.checkpoint_names
        for published, get in base.index_tensors(self, *args, **options).items():
            names.pop(published)
            for place, ours in enumerate(name.removeprefix(MODEL) for name in minicpmv.names_of(published)):
                found[ours] = partial(part, published, get, place)
                names[ours] = ours
        return found

    def generate_extra_tensors(self: Any) -> Iterable[tuple[str, torch.Tensor]]:
        from mbq_gguf.models.resampler import position_embeddings

        width = self.model_tensors[QUERY]().shape[-1]  # not config.json's, which nothing has compared with the weights yet
        yield PLACES, position_embeddings(1, 1, width)  # the runtime requires the tensor but computes the values itself

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        found: Iterable[tuple[str, Any]] = [(name, tensor)] if name == PLACES else base.modify_tensors(self, tensor, name, layer)
        return found

    def tensor_force_quant(self: Any, name: str, new_name: str, layer: int | None, dimensions: int) -> Any:
        return gguf.GGMLQuantizationType.F32 if new_name in FLOATS else base.tensor_force_quant(self, name, new_name, layer, dimensions)

    functions = (__init__, set_gguf_parameters, index_tensors, generate_extra_tensors, modify_tensors, tensor_force_quant)
    methods: Mapping[str, Any] = {function.__name__: function for function in functions}
    own = {"model_arch": base.model_arch, "filter_tensors": classmethod(filter_tensors)}
    return type("MiniCPMVVisionModel", (base,), {**own, **methods})


def part(published: str, get: Callable[[], Any], place: int) -> Any:
    """Part ``place`` of a published tensor."""
    return minicpmv.parts_of(published, get())[place]
