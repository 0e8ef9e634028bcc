"""Attention over a batch of concatenated samples, each of which attends only to itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Apart(TorchFunctionMode):
    """While open, causal attention over a batch [1, heads, tokens, channels] stays within each sample; ``lengths`` are their numbers of
    tokens."""

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
    """Compute what :class:`Apart` describes with one call for each run of neighbours of equal length. Nothing is copied."""
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
    """Compute what :class:`Apart` describes with one call for samples of similar lengths, each padded to the longest. Causal queries do not
    see the padding, which comes last.

    For GPUs, which would wait for the host. PyTorch's fused float32 kernel does not support grouped queries, so keys and values are
    repeated here; without the fused kernel a call launches 18 kernels and takes the host 0.4 ms, and a batch of 2048 tokens had seven
    calls.
    """

    def taken(x: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        found = x[0].index_select(1, places).view(x.shape[1], count, -1, x.shape[3]).transpose(0, 1)
        return found.repeat_interleave(query.shape[1] // x.shape[1], dim=1) if x.shape[1] < query.shape[1] else found

    calls = _places(lengths, query.device)
    parts = [_attended(*(taken(x, places, count) for x in (query, key, value)), **kwargs) for places, count in calls]
    return torch.cat(parts, dim=1).index_select(1, _way_back(lengths, query.device))[None]


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention [heads, samples * tokens, channels] for samples as a batch [samples, heads, tokens, channels]."""
    return scaled_dot_product_attention(query, key, value, **kwargs).transpose(0, 1).flatten(1, 2)


def _by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Group the samples' numbers by length, between two powers of two, so that padding at most doubles the work."""
    kind = [(length - 1).bit_length() for length in lengths]
    return [[number for number, own in enumerate(kind) if own == each] for each in sorted(set(kind))]


@lru_cache(maxsize=1024)
def _places(lengths: tuple[int, ...], device: torch.device) -> list[tuple[torch.Tensor, int]]:
    """For each call: which token of the batch is at each position (the sample's last one in the padding), and the number of samples."""
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
    """For each token of the batch, its position in the concatenated results of all calls."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    start = 0
    for some in _by_length(lengths):
        longest = max(lengths[number] for number in some)
        for number in some:
            found[number] = torch.arange(start, start + lengths[number])
            start += longest
    return torch.cat(found).to(device)
