"""Concatenates samples into batches: norms and matrix products run over the whole batch, attention within each sample.

A sample has about 150 tokens. Matrix products are most efficient from 1000 tokens on, and every operation has a fixed cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch

from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer

TOKENS = 2048  # maximum per batch, unless a single sample has more
# The same on a GPU, for which a batch of 2048 tokens is half as much work as launching its operations is for the host.
TOKENS_ON_CARD = 5120
# On a GPU there are this many batches, or twice as many, and so on, as even as samples allow, so that two, four or eight GPUs have equal
# shares. The number of GPUs does not influence it.
SHARES = 8
# The token axis of a layer's tensor arguments, by prefix of their names. Masks are not listed: a sample with a mask is a batch of its own.
TOKEN_AXES = {"position_embeddings": -2, "per_layer_input": -2, "position_ids": -1, "cache_position": -1}
SHARED = "shared_kv_states"  # the argument that passes keys and values to later layers (Gemma 4), by kind


def batches(streams: Sequence[Streamed], layer: Layer) -> Iterator[list[Streamed]]:
    """Split ``streams``, in order, into lists that :func:`joined` accepts for ``layer``, on the layer's device."""
    cut = _filled if layer.device.type == "cpu" else _even
    for run in _runs(streams, layer.index):
        yield from cut(run)


def batch_count(tokens: int, on_card: bool) -> int:
    """The number of batches for so many ``tokens`` in samples that can be joined; on a CPU sometimes one more."""
    count = math.ceil(tokens / TOKENS)
    return min(count, SHARES * math.ceil(tokens / (SHARES * TOKENS_ON_CARD))) if on_card else count


def _runs(streams: Sequence[Streamed], index: int) -> Iterator[list[Streamed]]:
    """Runs of neighbours that can be in one batch in layer ``index``."""
    run: list[Streamed] = []
    for stream in streams:
        if run and (index in stream.alone or not _alike(run[0].kwargs[index], stream.kwargs[index])):
            yield run
            run = []
        run.append(stream)
    if run:
        yield run


def _filled(run: Sequence[Streamed]) -> Iterator[list[Streamed]]:
    """Batches that are filled one after the other."""
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
    """Batches of nearly equal size; the middle of a stream decides which batch it belongs to."""
    ends = list(accumulate(len(stream.ids) for stream in run))
    total = max(1, ends[-1])
    count = batch_count(total, on_card=True)
    places = [count * (2 * end - len(stream.ids)) // (2 * total) for stream, end in zip(run, ends, strict=True)]
    for _, batch in groupby(zip(places, run, strict=True), key=lambda placed: placed[0]):
        yield [stream for _, stream in batch]


def joined(batch: Sequence[Streamed], index: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states [1, tokens, width] and keyword arguments for running layer ``index`` on all of ``batch``, inside :class:`Apart`."""
    kwargs, handed = batch[0].kwargs[index], batch[0].handed
    if len(batch) > 1:
        kwargs = {name: _joined([stream.kwargs[index][name] for stream in batch], _axis(name)) for name in kwargs}
    if handed:
        kwargs = kwargs | {SHARED: {kind: _joined([(stream.handed or {})[kind] for stream in batch], -2) for kind in handed}}
    entering = [stream.entering(index) for stream in batch]
    return _joined(entering, 1) if len(batch) > 1 else entering[0], kwargs


def _alike(kwargs: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these arguments can be concatenated: tensors have a known token axis, everything else is equal."""
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
        if len({value.device for value in values}) > 1:  # the GPU's memory ended within the batch
            values = [value.cpu() for value in values]
        return _side_by_side(values, axis) if _lie_side_by_side(values, axis) else torch.cat(values, dim=axis)
    if isinstance(values[0], list | tuple):
        return type(values[0])(_joined(list(parts), axis) for parts in zip(*values, strict=True))
    return values[0]


def _lie_side_by_side(values: Sequence[torch.Tensor], axis: int) -> bool:
    """Whether ``values`` are adjacent parts of one tensor along ``axis``, as a layer leaves them for the next one. Copying all six of them
    takes 1 to 3 % of a layer's time.
    """
    first, start = values[0], values[0].storage_offset()
    for value in values:
        same = value.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and value.stride() == first.stride()
        if not same or value.storage_offset() != start:
            return False
        start += value.shape[axis] * value.stride(axis)
    return True


def _side_by_side(values: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The tensor of which ``values`` are parts, see :func:`_lie_side_by_side`."""
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    return values[0].as_strided(shape, values[0].stride())


def _axis(name: str) -> int | None:
    return next((axis for beginning, axis in TOKEN_AXES.items() if name.startswith(beginning)), None)
