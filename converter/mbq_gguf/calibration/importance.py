"""Computes the importance matrix: the magnitude of each input channel of each decoder linear on pictures and questions, as llama.cpp
defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mbq_gguf.calibration.stream import advance, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel


@dataclass(frozen=True)
class Importance:
    """``sums`` has, by decoder key (``layers.0.mlp.up_proj.weight``), the squared input summed over ``tokens`` tokens [columns], float64 on
    the host.
    """

    sums: dict[str, torch.Tensor]
    tokens: int
    samples: int


@torch.no_grad()
def importance(
    loaded: LoadedModel, captured: Iterable[Streamed], progress: Callable[[int, int], None] = lambda done, total: None
) -> Importance:
    """Sum the squared inputs of every decoder linear over all tokens, with one layer on the device at a time.

    ``captured`` are samples before layer 0; ``progress`` is called with the number of finished layers and their total.
    """
    streams = list(captured)
    sums: dict[str, torch.Tensor] = {}
    total = len(loaded.decoder.layers)
    for index in range(total):
        layer = working_layer(loaded, index)
        squares = _Squares(layer)
        for stream in streams:
            advance(layer, [stream])
        for site in layer.sites:
            for name in map(layer.layout.linear_of, site.readers):
                sums[f"layers.{index}.{name}.weight"] = squares.sums[site.name].cpu()
        progress(index + 1, total)
    return Importance(sums, sum(len(stream.ids) for stream in streams), len(streams))


class _Squares:
    """Hooks on ``layer`` that sum the squared inputs of each site."""

    def __init__(self, layer: Layer) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        for site in layer.sites:
            layer.holder(site.readers[0]).register_forward_pre_hook(self._hook(site.name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Within a sample float32 is as exact as llama.cpp; sums over thousands of samples need float64.
            square = args[0][0].float().square().sum(dim=0).double()
            self.sums[name] = self.sums[name] + square if name in self.sums else square

        return add
