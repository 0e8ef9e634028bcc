"""What a search compares on: the inputs of a group's linears, and what its inspected module makes of them in the original model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.packs import Apart, packs
from mbq_gguf.calibration.stream import Streamed, run_pack, to_device
from mbq_gguf.models.decoder import Group

# Of the calls of one group that stay on the device; what goes beyond waits on the host, and every candidate fetches it again.
DEVICE_BYTES = 4 << 30


@dataclass
class Call:
    """A call of an inspected module for samples of ``lengths`` tokens, one behind another: its arguments, the original model's output
    [tokens, channels] and the loss weight of each token [tokens]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    weight: torch.Tensor
    lengths: tuple[int, ...] = ()

    def run(self, module: nn.Module) -> torch.Tensor:
        """What ``module`` makes of the arguments now [tokens, channels]."""
        device = next(module.parameters()).device
        with Apart(self.lengths) if len(self.lengths) > 1 else nullcontext():
            out = module(*to_device(self.args, device), **to_device(self.kwargs, device))
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, torch.Tensor)
        return result[0]

    def to(self, device: torch.device) -> Call:
        """The same on ``device``."""
        args, kwargs, output = (to_device(value, device) for value in (self.args, self.kwargs, self.output))
        return Call(args, kwargs, output, self.weight.to(device), self.lengths)


@dataclass(frozen=True)
class Entering:
    """A layer (number ``index``) and the streams at its door, which are left there."""

    layer: nn.Module
    index: int
    streams: Sequence[Streamed]

    def packs(self, count: int | None, first: bool) -> Iterator[list[Streamed]]:
        """The first ``count`` streams that have an answer, or the others of them, in packs."""
        asked = [stream for stream in self.streams if stream.labels.any()]
        count = len(asked) if count is None else count
        return packs(asked[:count] if first else asked[count:], self.index)


@torch.no_grad()
def observed_calls(
    original: Entering, rounded: Entering | None, group: Group, weights: TokenWeights, count: int | None
) -> tuple[list[Call], torch.Tensor]:
    """Calls of ``group``'s inspected module on the first ``count`` samples (None: all), in packs, and mean |x| [columns] of the inputs of
    its linears over all tokens of all samples. Streams that have no answer (synthetic ones) are left out of both.

    Inputs are those of ``rounded``, where the model before is rounded already, or else of ``original``, which the outputs are of.
    """
    calls: list[Call] = []
    total, tokens, held = torch.zeros(()), 0, 0
    for first in (True, False):
        for pack, changed in zip(*(entering.packs(count, first) for entering in (original, rounded or original)), strict=True):
            args, kwargs, output = _call(original, pack, group.inspected)
            if rounded is not None:
                args, kwargs, _ = _call(rounded, changed, group.inspected)
            x = (args[0] if args else kwargs["hidden_states"])[0]  # what the inspected module is given is what its first linears read
            total, tokens = total.to(x.device) + x.float().abs().sum(dim=0), tokens + len(x)
            if first:
                weight = torch.cat([weights(stream, group) for stream in pack]).to(output.device)
                call = Call(args, kwargs, output, weight, tuple(stream.hidden.shape[1] for stream in pack))
                held += sum(value.numel() * value.element_size() for value in (x, output))
                calls.append(call if held <= DEVICE_BYTES else call.to(torch.device("cpu")))
    return calls, total / max(1, tokens)


class _ReachedError(Exception):
    """Ends a layer's run behind the module that was wanted."""


def _call(entering: Entering, pack: Sequence[Streamed], name: str) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """Arguments and output [tokens, channels] of the layer's module ``name`` when ``pack`` enters; the run ends there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
    handle = entering.layer.get_submodule(name).register_forward_hook(_keep(seen), with_kwargs=True)
    try:
        run_pack(entering.layer, entering.index, pack)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _keep(seen: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, (output[0] if isinstance(output, tuple) else output)[0]))
        raise _ReachedError

    return hook
