"""Holds the decoder on the device while the model generates: as stored if it fits, else with its matrices in 8 or 4 bits.

A text takes 127 steps through all layers, so they must stay on the device: reading a 72B from its files for each step would take hours. A
copy in 4 bits, with a scale for each group of 64 weights, takes 38 GB. Texts sampled at temperature 1.6 need no exact weights; the stored
ones are used if they fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import linear

from mbq_gguf.errors import UserError
from mbq_gguf.memory import available
from mbq_gguf.models.lazy import materialise, set_tensor, tensors_of
from mbq_gguf.models.loaded import LoadedModel

GROUP = 64  # weights per scale
SHARE = 0.85  # of free memory may be used for weights; the rest is for keys, values and scores
NARROW = (8, 4)


class Narrow(nn.Module):
    """A linear with a symmetric matrix in 8 or 4 bits, which each call converts to the input's dtype."""

    def __init__(self, module: nn.Linear, bits: int) -> None:
        super().__init__()
        rows, columns = module.weight.shape
        group = GROUP if columns % GROUP == 0 else columns
        self.shape, self.bias = (rows, columns), module.bias
        self.packed = bits == 4 and columns % 2 == 0
        largest = 2 ** (bits - 1) - 1
        groups = module.weight.detach().float().view(rows, -1, group)
        self.scale = nn.Buffer((groups.abs().amax(dim=2, keepdim=True) / largest).clamp(min=1e-30), persistent=False)
        codes = (groups / self.scale).round_().to(torch.int8).view(rows, columns)
        if self.packed:
            codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
        self.codes = nn.Buffer(codes, persistent=False)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, columns]."""
        codes = torch.stack([(self.codes << 4) >> 4, self.codes >> 4], dim=2) if self.packed else self.codes
        made: torch.Tensor = codes.view(*self.scale.shape[:2], -1).to(dtype) * self.scale.to(dtype)
        return made.view(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same as a linear's."""
        return linear(x, self.weight(x.dtype), self.bias)


def bits_with_room(loaded: LoadedModel, dtype: torch.dtype) -> int:
    """The most bits per weight, those of ``dtype`` or one of :data:`NARROW`, with which the decoder's matrices fit on the device.

    Raises UserError if none do.
    """
    matrices = sum(linear.weight.numel() for _, linear in loaded.decoder.linears())
    others = sum(parameter.numel() for parameter in loaded.decoder.layers.parameters()) - matrices
    room = SHARE * available(loaded.device)
    for bits in (dtype.itemsize * 8, *NARROW):
        scales = 0 if bits > max(NARROW) else 32 / GROUP
        if matrices * (bits + scales) / 8 + others * dtype.itemsize <= room:
            return bits
    raise UserError(
        f"{loaded.device} has no room for the decoder to write texts with, {matrices / 2e9:.1f} GB in 4 bits: give --synthetic 0 and a "
        "JSONL set, or --device cpu"
    )


@contextmanager
def in_bits(loaded: LoadedModel, bits: int, dtype: torch.dtype) -> Iterator[None]:
    """While open, all decoder layers are on the device in ``dtype``, with matrices in ``bits``; they are read from their files one by
    one."""
    if bits > max(NARROW):
        with loaded.whole(dtype):
            yield
        return
    layers = loaded.decoder.layers
    before, replaced = list(tensors_of(layers)), []
    try:
        for layer in layers:
            names = loaded.decoder.layout.of(layer).linears
            materialise(layer, loaded.device, dtype)
            for name in names:
                parent, _, own = name.rpartition(".")
                owner, module = layer.get_submodule(parent), layer.get_submodule(name)
                assert isinstance(module, nn.Linear)
                replaced.append((owner, own, module))
                setattr(owner, own, Narrow(module, bits))
                module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
        yield
    finally:
        for owner, own, module in replaced:
            setattr(owner, own, module)
        for owner, name, value in before:
            set_tensor(owner, name, value)
