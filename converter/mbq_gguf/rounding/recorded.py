"""Records loops of small GPU operations as a CUDA graph and replays them with one launch, for loops without a kernel in
:mod:`mbq_gguf.rounding.kernels`.

A matrix of 18944 columns needs half a million operations of a few microseconds each, and PyTorch takes longer to launch one than the GPU
to run it. On other devices, and the first time for given shapes, the operations run directly; the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Record ``run`` as a graph. Does not use torch.cuda.graph, which empties the allocator's cache each time."""
    kept = tuple(argument.clone(memory_format=torch.contiguous_format) for argument in arguments)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(arguments[0].device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(arguments[0].device))
    with torch.cuda.stream(stream):
        graph.capture_begin(_pool(), capture_error_mode="thread_local")
        try:
            results = run(*kept)
        finally:
            graph.capture_end()
    torch.cuda.current_stream(arguments[0].device).wait_stream(stream)
    _KEPT.append(graph)
    return _Recording(graph, kept, results)


@cache
def _pool() -> Any:
    """The memory pool of all recordings; no two of them run at the same time."""
    return torch.cuda.graph_pool_handle()
