"""How many threads an operation takes, and batches computed side by side in threads of Python's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

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


def side_by_side(tools: Sequence[Tool], pieces: Sequence[Piece], compute: Callable[[Tool, Piece], Value]) -> Iterator[Value]:
    """What ``compute`` makes of each of ``pieces``, in order, without gradients: as many at a time as there are ``tools``, each of which
    one piece has to itself, with its share of this thread's cores."""
    share = max(1, torch.get_num_threads() // len(tools))
    free: SimpleQueue[Tool] = SimpleQueue()
    for tool in tools:
        free.put(tool)

    def computed(piece: Piece) -> Value:
        with threads(share), torch.no_grad():
            tool = free.get()
            try:
                return compute(tool, piece)
            finally:
                free.put(tool)

    with ThreadPoolExecutor(len(tools)) as pool:
        yield from pool.map(computed, pieces)
