"""How many threads an operation takes, and batches computed side by side in threads of Python's."""

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
def threads(count: int) -> Iterator[None]:
    """While open, operations of this thread, and of those that begin meanwhile, take ``count`` of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers(Generic[Tool]):
    """Threads that compute side by side, one for each of ``tools``, which one piece has to itself."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._count, self._pool = len(tools), ThreadPoolExecutor(len(tools))
        self._free: SimpleQueue[Tool] = SimpleQueue()
        for tool in tools:
            self._free.put(tool)

    def each(self, pieces: Iterable[Piece], compute: Callable[[Tool, Piece], Value]) -> Iterator[Value]:
        """What ``compute`` makes of each of ``pieces``, in order, without gradients, and with a worker's share of the caller's cores.

        One piece for each worker is on its way while the caller works with the one before, and may give the workers other pieces;
        it makes the ``pieces`` themselves meanwhile, where they are an iterator.
        """
        share = max(1, torch.get_num_threads() // self._count)

        def computed(piece: Piece) -> Value:
            with threads(share), torch.no_grad():
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
