"""Batches in parallel: in order, each with a worker of its own, and every thread with its share of the cores."""

from __future__ import annotations

import threading

import pytest
import torch
from mbq_gguf.threads import Workers, torch_threads

BOTH = threading.Barrier(2, timeout=60)


def test_results_come_in_order_and_pieces_share_no_tool() -> None:
    taken: dict[str, threading.Lock] = {"left": threading.Lock(), "right": threading.Lock()}
    tools: set[str] = set()

    def compute(tool: str, piece: int) -> int:
        assert taken[tool].acquire(blocking=False)
        tools.add(tool)
        BOTH.wait()  # for the other tool's piece: there are always two at a time
        taken[tool].release()
        return piece * piece

    with Workers(list(taken)) as workers:
        assert list(workers.each(range(40), compute)) == [piece * piece for piece in range(40)]
    assert tools == {"left", "right"}


def test_each_has_its_share_of_the_cores_and_no_gradients() -> None:
    with torch_threads(6), Workers("abc") as workers:
        found = list(workers.each(range(9), lambda _tool, _piece: (torch.get_num_threads(), torch.is_grad_enabled())))
        assert torch.get_num_threads() == 6
    assert found == [(2, False)] * 9


def test_an_error_ends_it() -> None:
    def compute(_tool: str, piece: int) -> int:
        if piece == 3:
            raise OSError("the disk is gone")
        return piece

    with Workers("ab") as workers, pytest.raises(OSError, match="the disk is gone"):
        list(workers.each(range(1000), compute))
    assert torch.is_grad_enabled()
