"""Function-preserving rotations that spread outliers over all channels (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

Offline rotations are folded into weights: one rotation R for the residual stream, and one per layer for the values of each key/value head.
The online one is a block-diagonal Hadamard transform of down_proj's input, which the patched llama.cpp computes (``mbq.hadamard.ffn_down``
in the file); its random signs are folded into up_proj, since they commute with the product with the gate.

Vectors are rows: hidden states h become h R. A linear that reads the stream gets W diag(gain) R, one that writes it gets R^T W and R^T b. A
norm's gain does not commute with the rotation, so it moves into the linears that follow and the norm's own gain becomes 1. Only norms
without mean and bias (RMSNorm) commute with a rotation.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from mbq_gguf.errors import UsageError
from mbq_gguf.models.decoder import Decoder
from mbq_gguf.models.layer import Layer, norm_offset
from mbq_gguf.models.layouts import ROTATABLE
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.transforms.hadamard import block_size, factors, hadamard, random_rotation, random_signs

Rotate = Literal["none", "offline", "full"]


@dataclass(frozen=True)
class Rotation:
    """The random rotations for one model, float64 on the host.

    ``residual`` [width, width]; ``values``: one [head_dim, head_dim] per layer; ``signs``: one [ffn width] per layer, and ``block``: the
    Hadamard block size before down_proj, or () and 0 without an online transform.
    """

    residual: torch.Tensor
    values: tuple[torch.Tensor, ...]
    signs: tuple[torch.Tensor, ...]
    block: int


def check_rotatable(loaded: LoadedModel, rotate: Rotate) -> None:
    """Raise UsageError, with the reason, if the model does not allow the rotation ``rotate``; reads no weights."""
    reason = loaded.decoder.layout.no_rotation()
    if reason and rotate != "none":
        raise UsageError(f"{loaded.architecture} cannot be rotated, {reason}: use --rotate none, or a model of {', '.join(ROTATABLE)}")
    _check_widths(loaded.decoder, rotate)


def _check_widths(decoder: Decoder, rotate: Rotate) -> None:
    if rotate == "none":
        return
    norm = _stopping_norm(decoder)
    if norm is not None:
        raise UsageError(f"{type(norm).__name__} does not commute with a rotation: use --rotate none")
    for width in (decoder.embed_tokens.embedding_dim, Layer(decoder.layers[0], 0, decoder.layout).head_dim):
        if factors(width) is None:
            raise UsageError(f"no construction gives a Hadamard matrix of order {width}, a width of this model: use --rotate none")
    ffn = _ffn_width(decoder)
    if rotate == "full" and block_size(ffn) == 1:
        raise UsageError(f"a feed-forward width of {ffn} has no power of two for the online Hadamard transform: use --rotate offline")


def draw(decoder: Decoder, rotate: Literal["offline", "full"], seed: int) -> Rotation:
    """Draw the rotations for ``decoder``, reproducibly from ``seed``. Raises UsageError if its norms or widths do not allow rotation."""
    _check_widths(decoder, rotate)
    generator = torch.Generator().manual_seed(seed)
    first = Layer(decoder.layers[0], 0, decoder.layout)
    width, ffn = decoder.embed_tokens.embedding_dim, _ffn_width(decoder)
    block = block_size(ffn) if rotate == "full" else 0
    count = len(decoder.layers)
    return Rotation(
        residual=random_rotation(width, generator),
        values=tuple(random_rotation(first.head_dim, generator) for _ in range(count)),
        signs=tuple(random_signs(ffn, generator) for _ in range(count)) if block else (),
        block=block,
    )


def file_keys(rotate: Rotate, block: int = 0) -> dict[str, Any]:
    """The metadata that record a file's rotation; text and vision file only fit together if they agree.

    ``block`` is the block size of the transform that the patched llama.cpp computes before ffn_down, 0 for none.
    """
    if rotate == "none":
        return {}
    return {"mbq.rotate": rotate} | ({"mbq.hadamard.ffn_down": block} if block else {})


def widest_rotation(loaded: LoadedModel) -> Rotate:
    """The most extensive rotation that the model allows."""
    decoder = loaded.decoder
    if decoder.layout.no_rotation() or _stopping_norm(decoder) is not None:
        return "none"
    return "full" if block_size(_ffn_width(decoder)) > 1 else "offline"


def _stopping_norm(decoder: Decoder) -> nn.Module | None:
    """A norm with a mean or a bias, which does not commute with rotations, or None."""
    for norm in (decoder.norm, *(layer.get_submodule(name) for layer in decoder.layers for name in decoder.layout.norms)):
        if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
            return norm
    return None


def _ffn_width(decoder: Decoder) -> int:
    return Layer(decoder.layers[0], 0, decoder.layout).linear(decoder.layout.last.readers[0]).in_features


def block_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """The online transform: each ``block`` channels of ``x`` [..., channels] times the symmetric Hadamard matrix over sqrt(block)."""
    blocks: torch.Tensor = x.reshape(*x.shape[:-1], -1, block) @ _normalised(block, x.dtype, x.device)
    return blocks.flatten(-2)


@cache
def _normalised(block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return hadamard(block).to(dtype=dtype, device=device)  # cached: computing it for every call takes 6 % of a conversion


@torch.no_grad()
def rotate_layer(layer: Layer, rotation: Rotation) -> None:
    """Rotate ``layer`` in place, in float64, stored in the layer's dtype; a hook computes the online transform."""
    residual = rotation.residual.to(layer.device)
    for site in layer.sites:
        previous = layer.absorber(site)
        if isinstance(previous, nn.Linear):
            continue
        gain = absorb_gain(previous)
        for name in site.readers:
            _set(layer.linear(name).weight, (layer.linear(name).weight.double() * gain) @ residual)
    for branch in layer.layout.branches:
        rotate_output(layer.linear(branch.writer), residual)
    _rotate_values(layer, rotation.values[layer.index].to(residual.device))
    if rotation.block:
        signs = rotation.signs[layer.index].to(residual.device)
        up, down = _ends(layer, "down")
        _set(up.weight, up.weight.double() * signs[:, None])
        if up.bias is not None:
            _set(up.bias, up.bias.double() * signs)
        _set(down.weight, block_hadamard(down.weight.double() * signs, rotation.block))
        down.register_forward_pre_hook(lambda _module, args: (block_hadamard(args[0], rotation.block),))


def absorb_gain(norm: nn.Module) -> torch.Tensor:
    """Return the norm's gain in float64 and set it to 1."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    offset = norm_offset(norm)
    gain = weight.detach().double() + offset
    weight.detach().fill_(1.0 - offset)
    return gain


@torch.no_grad()
def rotate_output(module: nn.Linear, residual: torch.Tensor) -> None:
    """Rotate the output of a linear that writes the residual stream: R^T W, R^T b."""
    residual = residual.to(module.weight.device)
    _set(module.weight, residual.t() @ module.weight.double())
    if module.bias is not None:
        _set(module.bias, module.bias.double() @ residual)


def rotated_embeddings(decoder: Decoder, rotation: Rotation) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and output head in the rotated basis, float32, by decoder-relative name.

    The head absorbs the final norm's gain, so that it differs from the embedding: a tied model becomes untied.
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
    """The projector's last linears, and the parameter used between the rows of a picture, rotated so that image features arrive in the
    rotated basis; by the ends of their names."""
    ending, newline = loaded.decoder.layout.projector, loaded.decoder.layout.newline
    assert ending is not None
    name = "embed_tokens.weight"
    rotated = {name: rotated_embeddings(loaded.decoder, rotation)[name].cpu()} if loaded.decoder.layout.embeds else {}
    if newline is not None:
        row = next(row for path, row in loaded.model.named_parameters() if path.rpartition(".")[2] == newline)
        rotated[newline] = (row.detach().double() @ rotation.residual.to(row.device)).float().cpu()
    for path, found in loaded.model.named_modules():
        match = re.search(f"(?:^|[.])({ending})$", path)
        if match:
            assert isinstance(found, nn.Linear)
            module = copy.deepcopy(found).float()
            rotate_output(module, rotation.residual)
            rotated |= {f"{match[1]}.{name}": parameter.detach().cpu() for name, parameter in module.named_parameters()}
    return rotated


def _rotate_values(layer: Layer, rotation: torch.Tensor) -> None:
    """Multiply the values of every key/value head by ``rotation``; o_proj undoes it for each query head that reads them."""
    size = rotation.shape[0]
    value, out = _ends(layer, "o")
    _set(value.weight, (rotation.t() @ value.weight.double().view(-1, size, value.in_features)).flatten(0, 1))
    if value.bias is not None:
        _set(value.bias, (value.bias.double().view(-1, size) @ rotation).flatten())
    _set(out.weight, (out.weight.double().view(out.out_features, -1, size) @ rotation).flatten(1))


def _ends(layer: Layer, name: str) -> tuple[nn.Linear, nn.Linear]:
    """The linears before and after site ``name`` (v_proj and o_proj, or up_proj and down_proj)."""
    site = layer.layout.site(name)
    before = layer.absorber(site)
    assert isinstance(before, nn.Linear)
    return before, layer.linear(site.readers[0])


def _set(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.detach().copy_(value)
