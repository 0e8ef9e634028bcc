"""Limits PyTorch's threads, and computes batches in parallel Python threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Piece = TypeVar("Piece")
Value = TypeVar("Value")
Tool = TypeVar("Tool")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use ``count`` PyTorch threads in the block, for this thread and for threads that start meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers(Generic[Tool]):
    """A pool with one thread for each of ``tools``; each piece of work has a tool to itself."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._count, self._pool = len(tools), ThreadPoolExecutor(len(tools))
        self._free: SimpleQueue[Tool] = SimpleQueue()
        for tool in tools:
            self._free.put(tool)

    def each(self, pieces: Iterable[Piece], compute: Callable[[Tool, Piece], Value]) -> Iterator[Value]:
        """The results of ``compute`` for each of ``pieces``, in order, without gradients, with a worker's share of the caller's cores.

        While the caller processes one result, each worker computes another piece; the caller may also submit other pieces meanwhile. If
        ``pieces`` is an iterator, it advances in the caller's thread.
        """
        share = max(1, torch.get_num_threads() // self._count)

        def computed(piece: Piece) -> Value:
            with torch_threads(share), torch.no_grad():
                tool = self._free.get()
                try:
                    return compute(tool, piece)
                finally:
                    self._free.put(tool)

        found: deque[Future[Value]] = deque()
        try:
            for piece in pieces:
                found.append(self._pool.submit(computed, piece))
                if len(found) > self._count:
                    yield found.popleft().result()
            while found:
                yield found.popleft().result()
        finally:
            for future in found:
                future.cancel()

    def __enter__(self) -> Workers[Tool]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
