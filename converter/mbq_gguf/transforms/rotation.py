"""Rotations that leave the function as it is and spread outliers over all channels (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

Offline, folded into weights: the residual stream by one rotation R, the values of each key/value head by one rotation a layer. Online:
a block-diagonal Hadamard transform of down_proj's input, which the patched llama.cpp computes (``mbq.hadamard.ffn_down`` in the file);
its random signs are folded into up_proj, whose rows pass the gate's product one by one.

Row vectors: hidden states h become h R. A linear that reads the stream gets W diag(gain) R, one that writes it gets R^T W and R^T b. A
norm's gain cannot stay between stream and rotation, so it moves into the linears that follow and the norm keeps 1: only norms without
mean and bias (RMSNorm) let a rotation pass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import nn

from mbq_gguf.errors import UsageError
from mbq_gguf.models.decoder import GROUPS, NORMS, Decoder, linear, norm_offset
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.transforms.fold import head_dim
from mbq_gguf.transforms.hadamard import block_size, hadamard, random_rotation, random_signs

Rotate = Literal["none", "offline", "full"]
# The linear that writes image features into the residual stream, by the end of its name, for each architecture that has exactly one.
PROJECTORS = {
    "Qwen2VLForConditionalGeneration": "visual.merger.mlp.2",
    "Qwen2_5_VLForConditionalGeneration": "visual.merger.mlp.2",
}


@dataclass(frozen=True)
class Rotation:
    """Everything drawn for one model, float64 on the host.

    ``residual`` [width, width]; ``values`` one [head_dim, head_dim] a layer; ``signs`` one [ffn width] a layer and ``block`` the Hadamard
    block before down_proj, or () and 0 where nothing is computed online.
    """

    residual: torch.Tensor
    values: tuple[torch.Tensor, ...]
    signs: tuple[torch.Tensor, ...]
    block: int


def check_rotatable(loaded: LoadedModel) -> None:
    """UsageError where it is not known which linear brings image features into the stream."""
    if loaded.architecture not in PROJECTORS:
        raise UsageError(f"rotation is not known for {loaded.architecture}, only for {', '.join(PROJECTORS)}: use --rotate none")


def draw(decoder: Decoder, rotate: Literal["offline", "full"], seed: int) -> Rotation:
    """Draw the rotations of ``decoder``; the same seed gives the same ones. UsageError where a norm does not let a rotation pass."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (decoder.norm, *(layer.get_submodule(name) for layer in decoder.layers for name in NORMS)):
        if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
            raise UsageError(f"{type(norm).__name__} does not let a rotation pass: use --rotate none")
    first = decoder.layers[0]
    width, ffn = decoder.embed_tokens.embedding_dim, linear(first, "mlp.down_proj").in_features
    block = block_size(ffn) if rotate == "full" else 0
    if block == 1:
        raise UsageError(f"a feed-forward width of {ffn} has no power of two for the online Hadamard transform: use --rotate offline")
    count = len(decoder.layers)
    return Rotation(
        residual=random_rotation(width, generator),
        values=tuple(random_rotation(head_dim(first), generator) for _ in range(count)),
        signs=tuple(random_signs(ffn, generator) for _ in range(count)) if block else (),
        block=block,
    )


def block_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """The online transform: each ``block`` channels of ``x`` [..., channels] times the symmetric Hadamard matrix over sqrt(block)."""
    turned: torch.Tensor = x.reshape(*x.shape[:-1], -1, block) @ _normalised(block, x.dtype, x.device)
    return turned.flatten(-2)


@cache
def _normalised(block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return hadamard(block).to(dtype=dtype, device=device)  # kept: making it for every call took 6 % of a conversion


@torch.no_grad()
def rotate_layer(layer: nn.Module, rotation: Rotation, index: int) -> None:
    """Rotate decoder layer ``index`` in place, computed in float64 and stored in the layer's dtype; a hook does the online transform."""
    residual = rotation.residual.to(next(layer.parameters()).device)
    for group in GROUPS:
        previous = layer.get_submodule(group.previous)
        if isinstance(previous, nn.Linear):
            continue
        gain = absorb_gain(previous)
        for name in group.linears:
            _set(linear(layer, name).weight, (linear(layer, name).weight.double() * gain) @ residual)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        rotate_output(linear(layer, name), residual)
    _rotate_values(layer, rotation.values[index].to(residual.device))
    if rotation.block:
        signs = rotation.signs[index].to(residual.device)
        up, down = linear(layer, "mlp.up_proj"), linear(layer, "mlp.down_proj")
        _set(up.weight, up.weight.double() * signs[:, None])
        if up.bias is not None:
            _set(up.bias, up.bias.double() * signs)
        _set(down.weight, block_hadamard(down.weight.double() * signs, rotation.block))
        down.register_forward_pre_hook(lambda _module, args: (block_hadamard(args[0], rotation.block),))


def absorb_gain(norm: nn.Module) -> torch.Tensor:
    """The norm's gain, float64; the norm keeps 1."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    offset = norm_offset(norm)
    gain = weight.detach().double() + offset
    weight.data.fill_(1.0 - offset)
    return gain


@torch.no_grad()
def rotate_output(module: nn.Linear, residual: torch.Tensor) -> None:
    """Make a linear that writes the residual stream write it rotated: R^T W, R^T b."""
    residual = residual.to(module.weight.device)
    _set(module.weight, residual.t() @ module.weight.double())
    if module.bias is not None:
        _set(module.bias, module.bias.double() @ residual)


def rotated_ends(decoder: Decoder, rotation: Rotation) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and output head in the rotated basis, float32, by decoder-relative name.

    The head takes the final norm's gain, so it is no longer the embedding: a tied model is untied.
    """
    residual = rotation.residual.to(decoder.embed_tokens.weight.device)
    offset = norm_offset(decoder.norm)
    weight = decoder.norm.weight
    assert isinstance(weight, torch.Tensor)
    gain = weight.detach().double() + offset
    return {
        "embed_tokens.weight": (decoder.embed_tokens.weight.detach().double() @ residual).float(),
        "lm_head.weight": ((decoder.head.weight.detach().double() * gain) @ residual).float(),
        "norm.weight": torch.full_like(weight.detach(), 1.0 - offset, dtype=torch.float32),
    }


def rotated_projector(loaded: LoadedModel, rotation: Rotation) -> dict[str, torch.Tensor]:
    """Weight and bias of the projector's last linear, so that image features arrive in the rotated basis, by the ends of their names."""
    path = PROJECTORS[loaded.architecture]
    found = next(module for name, module in loaded.model.named_modules() if name.endswith(path))
    assert isinstance(found, nn.Linear)
    module = copy.deepcopy(found).float()
    rotate_output(module, rotation.residual)
    return {f"{path}.{name}": parameter.detach().cpu() for name, parameter in module.named_parameters()}


def _rotate_values(layer: nn.Module, rotation: torch.Tensor) -> None:
    """Values of every key/value head times ``rotation``; o_proj undoes it, once for each query head that reads them."""
    size = rotation.shape[0]
    value, out = linear(layer, "self_attn.v_proj"), linear(layer, "self_attn.o_proj")
    _set(value.weight, (rotation.t() @ value.weight.double().view(-1, size, value.in_features)).flatten(0, 1))
    if value.bias is not None:
        _set(value.bias, (value.bias.double().view(-1, size) @ rotation).flatten())
    _set(out.weight, (out.weight.double().view(out.out_features, -1, size) @ rotation).flatten(1))


def _set(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.data.copy_(value)
