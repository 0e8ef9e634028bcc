"""Finds the decoder of the language model inside a VLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mbq_gguf.errors import UsageError
from mbq_gguf.models.experts import open_experts
from mbq_gguf.models.layout import Layout
from mbq_gguf.models.layouts import layout_of

# Where transformers' classes have the language model of a VLM, most specific first.
DECODER_PATHS = ("model.language_model", "language_model.model", "model.text_model", "language_model", "model")


@dataclass
class Decoder:
    """The decoder stack of a loaded VLM. ``path`` is its name in the model (``model.language_model``)."""

    path: str
    module: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embed_tokens: nn.Embedding
    head: nn.Linear
    layout: Layout

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every quantisable linear with its decoder-relative name (``layers.0.self_attn.q_proj``)."""
        for index, layer in enumerate(self.layers):
            for name in self.layout.of(layer).linears:
                module = layer.get_submodule(name)
                assert isinstance(module, nn.Linear)
                yield f"layers.{index}.{name}", module


def find_decoder(model: nn.Module, architecture: str) -> Decoder | None:
    """The decoder stack of ``model``, its experts split into linears, or None if no path of :data:`DECODER_PATHS` leads to one."""
    head = getattr(model, "lm_head", None)
    if head is None:
        head = getattr(getattr(model, "language_model", None), "lm_head", None)
    for path in DECODER_PATHS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        layers, norm, embed = (getattr(module, name, None) for name in ("layers", "norm", "embed_tokens"))
        if (
            isinstance(layers, nn.ModuleList)
            and isinstance(norm, nn.Module)
            and isinstance(embed, nn.Embedding)
            and isinstance(head, nn.Linear)
        ):
            layout = layout_of(architecture)
            for layer in layers:
                for name in layout.stacks:
                    open_experts(layer, name)
            return Decoder(path, module, layers, norm, embed, head, layout)
    return None


def check_layers(decoder: Decoder, architecture: str, supported: str) -> None:
    """Raise a UsageError unless the layout describes every decoder layer."""
    for index, layer in enumerate(decoder.layers):
        fault = decoder.layout.fault(layer)
        if fault:
            raise UsageError(f"{architecture} is not supported, decoder layer {index} {fault}: use a model of {supported}")
