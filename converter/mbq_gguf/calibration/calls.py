"""Calls on which the search for equalisation factors compares candidates: a site's inspected module, its inputs, and the original's
outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.apart import Apart
from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.stream import run_batch, to_device
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site

# Calls of a site that stay on the device; the others stay on the host, and every candidate copies them again.
DEVICE_BYTES = 4 << 30


@dataclass
class Call:
    """A call of an inspected module for concatenated samples of ``lengths`` tokens: its arguments, the original model's output
    [tokens, channels] and the loss weight of each token [tokens].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    weight: torch.Tensor
    lengths: tuple[int, ...] = ()

    def run(self, module: nn.Module) -> torch.Tensor:
        """The output of ``module`` for these arguments [tokens, channels]."""
        device = next(module.parameters()).device
        with Apart(self.lengths) if len(self.lengths) > 1 else nullcontext():
            out = module(*to_device(self.args, device), **to_device(self.kwargs, device))
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, torch.Tensor)
        return result[0]

    def to(self, device: torch.device) -> Call:
        """A copy on ``device``."""
        args, kwargs, output = (to_device(value, device) for value in (self.args, self.kwargs, self.output))
        return Call(args, kwargs, output, self.weight.to(device), self.lengths)


@dataclass(frozen=True)
class Entering:
    """A layer and its input streams, which are not changed."""

    layer: Layer
    streams: Sequence[Streamed]

    def batches(self, count: int | None, first: bool) -> Iterator[list[Streamed]]:
        """The first ``count`` streams that have an answer, or all others that do, in batches."""
        asked = [stream for stream in self.streams if stream.labels.any()]
        count = len(asked) if count is None else count
        return batches(asked[:count] if first else asked[count:], self.layer)


@torch.no_grad()
def observed_calls(
    original: Entering, rounded: Entering | None, site: Site, weights: TokenWeights, count: int | None
) -> tuple[list[Call], torch.Tensor]:
    """Calls of ``site``'s inspected module for the first ``count`` samples (None: all), in batches, and mean |x| [columns] of the inputs of
    its linears over all tokens of all samples. Streams without an answer (synthetic ones) are excluded from both.

    Inputs come from ``rounded`` if the preceding layers are rounded already, else from ``original``, which always gives the outputs.
    """
    calls: list[Call] = []
    total, tokens, held = torch.zeros(()), 0, 0
    for first in (True, False):
        for batch, changed in zip(*(entering.batches(count, first) for entering in (original, rounded or original)), strict=True):
            args, kwargs, output = _call(original, batch, site.inspected)
            if rounded is not None:
                args, kwargs, _ = _call(rounded, changed, site.inspected)
            x = (args[0] if args else kwargs["hidden_states"])[0]  # the inspected module's input is that of its first linears
            total, tokens = total.to(x.device) + x.float().abs().sum(dim=0), tokens + len(x)
            if first:
                weight = torch.cat([weights(stream, site) for stream in batch]).to(output.device)
                call = Call(args, kwargs, output, weight, tuple(stream.hidden.shape[1] for stream in batch))
                held += sum(value.numel() * value.element_size() for value in (x, output))
                calls.append(call if held <= DEVICE_BYTES else call.to(torch.device("cpu")))
    return calls, total / max(1, tokens)


def _call(entering: Entering, batch: Sequence[Streamed], name: str) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """Arguments and output [tokens, channels] of the layer's module ``name`` for ``batch``."""
    (args, kwargs), output = entering.layer.call_of(name, lambda: run_batch(entering.layer, batch))
    return args, kwargs, output
