"""The importance matrix: how large each input channel of each decoder linear is on pictures and their questions, as llama.cpp keeps it."""

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
    """``sums`` holds, by decoder key (``layers.0.mlp.up_proj.weight``), the sum over ``tokens`` tokens of the squared input [columns],
    float64 on the host."""

    sums: dict[str, torch.Tensor]
    tokens: int
    samples: int


@torch.no_grad()
def importance(
    loaded: LoadedModel, captured: Iterable[Streamed], progress: Callable[[int, int], None] = lambda done, total: None
) -> Importance:
    """Sums of squared inputs of every decoder linear, all tokens alike, one layer on the device at a time.

    ``captured`` are samples before layer 0; ``progress`` is called with layers done and their number.
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
    """Hooks on ``layer`` that add up the squared inputs of each site."""

    def __init__(self, layer: Layer) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        for site in layer.sites:
            layer.holder(site.readers[0]).register_forward_pre_hook(self._hook(site.name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # A sample's sum in float32 is as good as llama.cpp's; thousands of samples are added in float64.
            square = args[0][0].float().square().sum(dim=0).double()
            self.sums[name] = self.sums[name] + square if name in self.sums else square

        return add
