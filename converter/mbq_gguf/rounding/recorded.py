"""Loops of small operations on a card as one launch: recorded as a CUDA graph, then replayed. For what :mod:`mbq_gguf.rounding.kernels`
has no kernel of, and where there are none.

A matrix of 18944 columns takes half a million operations of a few microseconds each, and PyTorch takes longer to launch one than the card
to do it. Elsewhere, and the first time for arguments of some shapes, the operations run as they are: the same code decides the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]
_KEPT: list[torch.cuda.CUDAGraph] = []  # PyTorch gives their memory up with the last of them, and can then record no other there


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    arguments: Tensors
    results: Tensors


class Recorded:
    """``run`` of tensors, which looks at no value on the host and may change its arguments; of those the caller keeps no use afterwards.

    On a card results lie in memory that the next call of any of these overwrites, and arguments are left as they were.
    """

    def __init__(self, run: Callable[..., Tensors]) -> None:
        self.run = run
        self.seen: set[Shapes] = set()
        self.recordings: dict[Shapes, _Recording] = {}

    def __call__(self, *arguments: torch.Tensor) -> Tensors:
        if arguments[0].device.type != "cuda":
            return self.run(*arguments)
        shapes = tuple(tuple(argument.shape) for argument in arguments)
        if shapes not in self.seen:  # libraries that set themselves up at their first call must not do so in a recording
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
    """``run`` as a graph. Not by torch.cuda.graph, which empties the allocator's cache each time."""
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
    """The memory of all recordings: no two of them run at the same time."""
    return torch.cuda.graph_pool_handle()
