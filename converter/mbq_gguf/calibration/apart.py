"""Attention over a batch of samples that stand one behind another: over each of them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Apart(TorchFunctionMode):
    """While open, causal attention over a batch [1, heads, tokens, channels] is that of each sample alone; ``lengths`` are their tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths, self.tokens = tuple(lengths), sum(lengths)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        assert kwargs["is_causal"]
        assert {x.shape[-2] for x in args} == {self.tokens}
        return (by_neighbours if args[0].device.type == "cpu" or args[0].requires_grad else padded)(self.lengths, *args, **kwargs)


def by_neighbours(lengths: tuple[int, ...], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """What :class:`Apart` computes, neighbours of one length in a call: nothing is moved."""
    parts, start = [], 0
    for length, count in ((length, len(list(run))) for length, run in groupby(lengths)):
        end = start + length * count
        together = (x[0, :, start:end].view(x.shape[1], count, length, x.shape[3]).transpose(0, 1) for x in (query, key, value))
        parts.append(_attended(*together, **kwargs))
        start = end
    return torch.cat(parts, dim=1)[None]


def padded(
    lengths: tuple[int, ...], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool = False, **kwargs: Any
) -> torch.Tensor:
    """What :class:`Apart` computes, samples of like lengths in a call, each padded to the longest of them: no causal query sees what lies
    behind it.

    For cards, which wait for the host: PyTorch's fused kernel for float32 takes no grouped queries, so keys and values are repeated here;
    without it a call is 18 kernels and takes the host 0.4 ms, and a batch of 2048 tokens had seven.
    """

    def taken(x: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        found = x[0].index_select(1, places).view(x.shape[1], count, -1, x.shape[3]).transpose(0, 1)
        return found.repeat_interleave(query.shape[1] // x.shape[1], dim=1) if x.shape[1] < query.shape[1] else found

    calls = _places(lengths, query.device)
    parts = [_attended(*(taken(x, places, count) for x in (query, key, value)), **kwargs) for places, count in calls]
    return torch.cat(parts, dim=1).index_select(1, _way_back(lengths, query.device))[None]


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention [heads, samples * tokens, channels] of samples side by side [samples, heads, tokens, channels]."""
    return scaled_dot_product_attention(query, key, value, **kwargs).transpose(0, 1).flatten(1, 2)


def _by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Numbers of samples by lengths between two powers of two, so that padding at most doubles what they are."""
    kind = [(length - 1).bit_length() for length in lengths]
    return [[number for number, own in enumerate(kind) if own == each] for each in sorted(set(kind))]


@lru_cache(maxsize=1024)
def _places(lengths: tuple[int, ...], device: torch.device) -> list[tuple[torch.Tensor, int]]:
    """For each call, which token of the batch stands at each of its places, a sample's last one behind its end; and how many samples."""
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    found = []
    for some in _by_length(lengths):
        columns = torch.arange(max(lengths[number] for number in some))
        places = torch.minimum(starts[some, None] + columns, ends[some, None] - 1)
        found.append((places.flatten().to(device), len(some)))
    return found


@lru_cache(maxsize=1024)
def _way_back(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The place of each token of the batch in the results of all calls, one behind another."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    start = 0
    for some in _by_length(lengths):
        longest = max(lengths[number] for number in some)
        for number in some:
            found[number] = torch.arange(start, start + lengths[number])
            start += longest
    return torch.cat(found).to(device)
