"""Records loops of small GPU operations as a CUDA graph and replays them with one launch, for loops without a kernel in
:mod:`mbq_gguf.rounding.kernels`.

A matrix of 18944 columns needs half a million operations of a few microseconds each, and PyTorch takes longer to launch one than the GPU
to run it. On other devices, and the first time for given shapes, the operations run directly; the bytes are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]
_KEPT: list[
    torch.cuda.CUDAGraph
] = []  # keeps the shared memory pool alive; after its last graph is freed, PyTorch cannot record into it again


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    arguments: Tensors
    results: Tensors


class Recorded:
    """Wraps ``run``, a function of tensors that reads no values on the host. It may change its arguments; do not use them afterwards.

    On a GPU, the next call of any instance overwrites the results, and arguments are not changed.
    """

    def __init__(self, run: Callable[..., Tensors]) -> None:
        self.run = run
        self.seen: set[Shapes] = set()
        self.recordings: dict[Shapes, _Recording] = {}

    def __call__(self, *arguments: torch.Tensor) -> Tensors:
        if arguments[0].device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # then it is part of a larger recording
            return self.run(*arguments)
        shapes = tuple(tuple(argument.shape) for argument in arguments)
        if shapes not in self.seen:  # warm-up: libraries must not initialise themselves while recording
            self.seen.add(shapes)
            return self.run(*arguments)
        if shapes not in self.recordings:
            self.recordings[shapes] = _record(self.run, arguments)
        recording = self.recordings[shapes]
        for kept, argument in zip(recording.arguments, arguments, strict=True):
            kept.copy_(argument)
        recording.graph.replay()
        return recording.results


def _record(run: Callable[..., Tensors], arguments: Tensors) -> _Recording:
    """Record ``run`` as a graph. While it records, PyTorch does not give back memory that it holds unused. Where there is no other, that is
    done here, and only there, since whatever follows would have to take it again."""
    kept = tuple(argument.clone(memory_format=torch.contiguous_format) for argument in arguments)
    with suppress(torch.OutOfMemoryError):
        return _captured(run, kept)
    torch.cuda.empty_cache()
    return _captured(run, kept)


def _captured(run: Callable[..., Tensors], kept: Tensors) -> _Recording:
    """A recording of ``run`` with the arguments ``kept``. Does not use torch.cuda.graph, which empties the allocator's cache each time."""
    graph = torch.cuda.CUDAGraph()
    _KEPT.append(graph)
    stream = torch.cuda.Stream(kept[0].device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(kept[0].device))
    with torch.cuda.stream(stream):
        graph.capture_begin(_pool(), capture_error_mode="thread_local")
        try:
            results = run(*kept)
        finally:
            with warnings.catch_warnings(action="ignore"):  # that nothing was recorded, if memory was short at the first operation
                graph.capture_end()
    torch.cuda.current_stream(kept[0].device).wait_stream(stream)
    return _Recording(graph, kept, results)


@cache
def _pool() -> Any:
    """The memory pool of all recordings; no two of them run at the same time."""
    return torch.cuda.graph_pool_handle()
