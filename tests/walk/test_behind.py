"""Work on a finished layer while the next one runs: all of it is done, in order, and its errors are raised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event

import pytest
from mbq_gguf.walk.behind import Behind


class Full(Exception):
    pass


def fail() -> None:
    raise Full


def test_works_beside_and_is_done_behind_the_block() -> None:
    done: list[int] = []
    go = Event()

    def wait() -> None:
        assert go.wait(10)
        done.append(0)

    with Behind() as behind:
        behind.start(wait)
        assert not done
        go.set()
        for number in (1, 2):
            behind.start(partial(done.append, number))
    assert done == [0, 1, 2]


def test_what_was_raised_is_raised_at_the_next_start_or_at_the_end() -> None:
    with Behind() as behind:
        behind.start(fail)
        with pytest.raises(Full):
            behind.start(fail)
    with pytest.raises(Full), Behind() as behind:
        behind.start(fail)


def break_off(begun: Callable[[], None]) -> None:
    with Behind() as behind:
        behind.start(begun)
        raise ValueError("mine")


def test_an_error_of_the_block_is_the_one_that_is_heard_and_nothing_is_left_half_done() -> None:
    done: list[int] = []
    for begun in (partial(done.append, 1), fail):
        with pytest.raises(ValueError, match="mine"):
            break_off(begun)
    assert done == [1]
