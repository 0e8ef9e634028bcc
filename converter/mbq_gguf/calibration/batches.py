"""Samples concatenated into batches: norms and matrix products run over the whole batch at once, attention over each sample by itself.

A sample has about 150 tokens; a matrix product is at its best from 1000 on, and every operation has a cost a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch

from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer

TOKENS = 2048  # of a batch at most, unless one sample has more
# The same on a card, which a batch of 2048 tokens keeps busy for half as long as the host takes to begin its operations.
TOKENS_ON_CARD = 5120
# Batches of a card are as many as this, or twice as many ..., and as even as samples allow: so that two, four or eight cards have equal
# shares of them. The number of cards that there are has no say in it.
SHARES = 8
# Where a layer's tensor arguments have their tokens, by the beginning of their names. Masks are not here: with one, a sample goes alone.
TOKEN_AXES = {"position_embeddings": -2, "per_layer_input": -2, "position_ids": -1, "cache_position": -1}
SHARED = "shared_kv_states"  # the argument in which layers hand on keys and values to later ones (Gemma 4), by their kind


def batches(streams: Sequence[Streamed], layer: Layer) -> Iterator[list[Streamed]]:
    """``streams`` in their order, in lists that :func:`joined` takes for ``layer``, where it computes."""
    cut = _filled if layer.device.type == "cpu" else _even
    for run in _runs(streams, layer.index):
        yield from cut(run)


def _runs(streams: Sequence[Streamed], index: int) -> Iterator[list[Streamed]]:
    """Neighbours that may stand beside one another in layer ``index``."""
    run: list[Streamed] = []
    for stream in streams:
        if run and (index in stream.alone or not _alike(run[0].kwargs[index], stream.kwargs[index])):
            yield run
            run = []
        run.append(stream)
    if run:
        yield run


def _filled(run: Sequence[Streamed]) -> Iterator[list[Streamed]]:
    """Batches that take one stream more as long as there is room."""
    batch: list[Streamed] = []
    tokens = 0
    for stream in run:
        if batch and tokens + len(stream.ids) > TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(stream)
        tokens += len(stream.ids)
    yield batch


def _even(run: Sequence[Streamed]) -> Iterator[list[Streamed]]:
    """Batches of nearly one size: a stream is in the one in which its middle lies."""
    ends = list(accumulate(len(stream.ids) for stream in run))
    total = max(1, ends[-1])
    count = min(math.ceil(total / TOKENS), SHARES * math.ceil(total / (SHARES * TOKENS_ON_CARD)))
    places = [count * (2 * end - len(stream.ids)) // (2 * total) for stream, end in zip(run, ends, strict=True)]
    for _, batch in groupby(zip(places, run, strict=True), key=lambda placed: placed[0]):
        yield [stream for _, stream in batch]


def joined(batch: Sequence[Streamed], index: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hidden states [1, tokens, width] and keyword arguments with which layer ``index`` takes all of ``batch``, inside :class:`Apart`."""
    kwargs, handed = batch[0].kwargs[index], batch[0].handed
    if len(batch) > 1:
        kwargs = {name: _joined([stream.kwargs[index][name] for stream in batch], _axis(name)) for name in kwargs}
    if handed:
        kwargs = kwargs | {SHARED: {kind: _joined([(stream.handed or {})[kind] for stream in batch], -2) for kind in handed}}
    entering = [stream.entering(index) for stream in batch]
    return _joined(entering, 1) if len(batch) > 1 else entering[0], kwargs


def _alike(kwargs: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these arguments can be joined: tensors have a known axis of tokens, everything else is the same."""
    return kwargs.keys() == others.keys() and all(_joinable(kwargs[name], others[name], _axis(name)) for name in kwargs)


def _joinable(value: Any, other: Any, axis: int | None) -> bool:
    if isinstance(value, torch.Tensor):
        return axis is not None and isinstance(other, torch.Tensor)
    if isinstance(value, list | tuple):
        return isinstance(other, list | tuple) and all(_joinable(*pair, axis) for pair in zip(value, other, strict=True))
    return not isinstance(other, torch.Tensor) and bool(value == other)


def _joined(values: list[Any], axis: int | None) -> Any:
    if isinstance(values[0], torch.Tensor):
        assert axis is not None
        if len({value.device for value in values}) > 1:  # a card's room has ended within the batch
            values = [value.cpu() for value in values]
        return _side_by_side(values, axis) if _lie_side_by_side(values, axis) else torch.cat(values, dim=axis)
    if isinstance(values[0], list | tuple):
        return type(values[0])(_joined(list(parts), axis) for parts in zip(*values, strict=True))
    return values[0]


def _lie_side_by_side(values: Sequence[torch.Tensor], axis: int) -> bool:
    """Whether ``values`` are parts of one tensor along ``axis``, as a layer leaves samples to the next one: six copies of them are 1 to 3 %
    of a layer's time."""
    first, start = values[0], values[0].storage_offset()
    for value in values:
        same = value.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and value.stride() == first.stride()
        if not same or value.storage_offset() != start:
            return False
        start += value.shape[axis] * value.stride(axis)
    return True


def _side_by_side(values: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The tensor that :func:`_lie_side_by_side` has found ``values`` to be parts of."""
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    return values[0].as_strided(shape, values[0].stride())


def _axis(name: str) -> int | None:
    return next((axis for beginning, axis in TOKEN_AXES.items() if name.startswith(beginning)), None)
