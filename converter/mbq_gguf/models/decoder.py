"""The language model inside a VLM: its decoder layers, and the groups of linears that share an input.

A *standard* decoder layer is pre-norm with gated feed-forward: ``x + o(attention(q, k, v of norm(x)))``, then
``x + down(act(gate(y)) * up(y))`` with ``y = norm(x)``. Everything in the converter relies on that and on nothing else of a family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mbq_gguf.errors import UsageError

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")
# Norms beside these two (Gemma 2 and 3, GLM-4) sit between a linear and the residual stream: the groups below do not hold then.
FOREIGN_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
# Where transformers keeps the language model of a VLM, most specific first.
DECODER_PATHS = ("model.language_model", "language_model.model", "model.text_model", "language_model", "model")


@dataclass(frozen=True)
class Group:
    """Linears that share one input, and so one factor per input channel.

    The inverse factors are folded into ``previous``; the output of ``inspected`` is what a search compares; ``block`` says which of a
    layer's two modality ratios weighs it.
    """

    name: str
    previous: str
    linears: tuple[str, ...]
    inspected: str
    block: str  # "attention" or "mlp"


GROUPS = (
    Group("qkv", "input_layernorm", LINEARS[:3], "self_attn", "attention"),
    Group("o", "self_attn.v_proj", LINEARS[3:4], "self_attn.o_proj", "attention"),
    Group("gate_up", "post_attention_layernorm", LINEARS[4:6], "mlp", "mlp"),
    Group("down", "mlp.up_proj", LINEARS[6:], "mlp.down_proj", "mlp"),
)


@dataclass
class Decoder:
    """The decoder stack of a loaded VLM. ``path`` is where it hangs in the model (``model.language_model``)."""

    path: str
    module: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embed_tokens: nn.Embedding
    head: nn.Linear

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every quantisable linear by its decoder-relative name, ``layers.0.self_attn.q_proj`` and so on."""
        for index, layer in enumerate(self.layers):
            for name in LINEARS:
                yield f"layers.{index}.{name}", linear(layer, name)


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """The linear called ``name`` in a decoder layer."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def find_decoder(model: nn.Module) -> Decoder | None:
    """The decoder stack of ``model``, or None where no path of :data:`DECODER_PATHS` leads to one."""
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
            return Decoder(path, module, layers, norm, embed, head)
    return None


def check_standard(decoder: Decoder, architecture: str, supported: str) -> None:
    """Raise a UsageError unless every decoder layer is standard (see the module's docstring)."""
    for index, layer in enumerate(decoder.layers):
        fault = layer_fault(layer)
        if fault:
            raise UsageError(f"{architecture} is not supported, decoder layer {index} {fault}: use a model of {supported}")


def layer_fault(layer: nn.Module) -> str | None:
    """What keeps ``layer`` from being a standard decoder layer, or None."""
    modules = dict(layer.named_modules())
    for name in LINEARS:
        if not isinstance(modules.get(name), nn.Linear):
            return f"has no linear {name}"
    for name in NORMS:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
            return f"has no norm {name}"
    for name in FOREIGN_NORMS:
        if name in modules:
            return f"has a norm {name} after its blocks"
    return None


def norm_offset(norm: nn.Module) -> float:
    """What the norm adds to its weight before it multiplies: 0 for most families, 1 for Gemma's. Found by running it with weight 0."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    kept = weight.detach().clone()
    with torch.no_grad():
        probe = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
        bias = getattr(norm, "bias", None)
        weight.zero_()
        out = norm(probe) - (bias if isinstance(bias, torch.Tensor) else 0)
        weight.copy_(kept)
    return 0.0 if float(out.abs().max()) == 0.0 else 1.0
