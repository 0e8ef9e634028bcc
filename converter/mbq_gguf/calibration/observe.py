"""What one decoder layer sees on the calibration set: statistics of its linears' inputs, and calls of its inspected modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.packs import packs
from mbq_gguf.calibration.stream import Streamed, run_pack, unpack
from mbq_gguf.models.decoder import GROUPS, Group

# Inputs are kept only to be compared with those of the rounded model, which differ by far more than this type rounds off.
KEPT = torch.bfloat16

TokenWeights = Callable[[Streamed, Group], torch.Tensor]  # one weight a token [tokens], float32


@dataclass
class Call:
    """One sample's call of an inspected module: its arguments, its output [tokens, channels] and the loss weight of each token."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    weight: torch.Tensor


@dataclass
class InputStatistics:
    """Of the input x of one group's linears, on the device: ``mean_abs`` [columns] over all tokens and ``hessian`` [columns, columns],
    the sum over tokens of w_t x_t x_t^T (None where not asked for)."""

    mean_abs: torch.Tensor
    hessian: torch.Tensor | None
    tokens: int = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Add inputs ``x`` [tokens, columns]; ``weight`` [tokens] None means all alike."""
        self.mean_abs += (x.abs().sum(dim=0) - self.mean_abs * x.shape[0]) / (self.tokens + x.shape[0])
        self.tokens += x.shape[0]
        if self.hessian is not None:
            # Both sides alike, so that the sum is positive however the product is rounded.
            rooted = x if weight is None else x * weight.sqrt()[:, None]
            self.hessian.addmm_(rooted.t(), rooted)


@dataclass
class Observed:
    """By group name: statistics, the calls of each group's inspected module on the first samples, and all inputs where asked for, one
    [tokens, columns] a sample on the host."""

    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)


@torch.no_grad()
def observe(
    layer: nn.Module,
    index: int,
    streams: Sequence[Streamed],
    *,
    hessian_weights: TokenWeights | None,
    call_weights: TokenWeights | None,
    call_samples: int,
    keep_inputs: bool = False,
) -> Observed:
    """Run ``streams`` through ``layer`` (number ``index``), in place, and keep what calibration needs.

    ``hessian_weights`` None means no Hessians; ``call_weights`` None means no calls, else those of the first ``call_samples`` samples.
    With neither there are no statistics.
    """
    device = next(layer.parameters()).device
    observed = Observed(calls={group.name: [] for group in GROUPS}, inputs={group.name: [] for group in GROUPS})
    if call_weights is not None:
        _observe_calls(layer, index, streams[:call_samples], call_weights, observed.calls)
    for pack in packs(streams, index):
        with _Watch(layer) as watch:
            hidden = run_pack(layer, index, pack)
        for group in GROUPS:
            x = watch.inputs[group.name][0].float()
            if keep_inputs:
                observed.inputs[group.name] += torch.split(x.to(device="cpu", dtype=KEPT), [stream.hidden.shape[1] for stream in pack])
            if hessian_weights is None and call_weights is None:
                continue
            if group.name not in observed.statistics:
                square = None if hessian_weights is None else x.new_zeros(x.shape[1], x.shape[1])
                observed.statistics[group.name] = InputStatistics(x.new_zeros(x.shape[1]), square)
            weight = None if hessian_weights is None else torch.cat([hessian_weights(stream, group) for stream in pack]).to(device)
            observed.statistics[group.name].add(x, weight)
        unpack(pack, hidden)
    return observed


def _observe_calls(layer: nn.Module, index: int, streams: Sequence[Streamed], weights: TokenWeights, calls: dict[str, list[Call]]) -> None:
    """Add each sample's ``calls``; they are made again one by one, so the samples run alone here."""
    device = next(layer.parameters()).device
    for stream in streams:
        with _Watch(layer, with_calls=True) as watch:
            run_pack(layer, index, [stream])
        for group in GROUPS:
            args, kwargs, output = watch.calls[group.name]
            calls[group.name].append(Call(args, kwargs, output[0], weights(stream, group).to(device)))


class _Watch:
    """While open, keeps the latest input of each group's first linear and, on demand, the latest call of its inspected module."""

    def __init__(self, layer: nn.Module, with_calls: bool = False) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        for group in GROUPS:
            self.handles.append(layer.get_submodule(group.linears[0]).register_forward_pre_hook(self._input(group.name)))
            if with_calls:
                hook = self._call(group.name)
                self.handles.append(layer.get_submodule(group.inspected).register_forward_hook(hook, with_kwargs=True))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = args[0]

        return hook

    def _call(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls[name] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

        return hook
