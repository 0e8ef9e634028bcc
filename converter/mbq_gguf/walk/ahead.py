"""The original model one layer ahead: its next layer is run in threads while this one is rounded.

Rounding is many small operations one after the other, which leave the other cores of a CPU idle; the original's layers depend on none of
them. Moments fill all cores by themselves, so the threads rest meanwhile: without that they would be done before the later matrices are
rounded, and these alone. What comes out is the same bits as in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Condition, Thread

import torch

from mbq_gguf import parallel
from mbq_gguf.calibration.observe import Observed
from mbq_gguf.calibration.precision import fast_bfloat16
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.threads import torch_threads

WORKERS = 2  # run batches of a layer side by side, each on its share of the cores


@dataclass(frozen=True)
class Original:
    """What layer ``index`` of the original model shows: the streams behind it, its inputs and moments, and what its experts see of others'
    tokens."""

    index: int
    passed: list[Streamed]
    observed: Observed
    shares: list[float]


def helps(device: torch.device) -> bool:
    """Whether a thread beside the rounding has a core to itself and nothing in common with it: cards have queues of their own, processes
    of a run speak in turns, and where calibration multiplies in bfloat16 PyTorch's switch for that is the whole process's."""
    return device.type == "cpu" and torch.get_num_threads() > 1 and parallel.count() == 1 and not fast_bfloat16()


def workers(device: torch.device) -> int:
    """How many batches are run side by side on ``device``."""
    return WORKERS if helps(device) else 1


class Ahead:
    """At most one layer on its way; behind the block its threads have ended, if need be before its layer's end.

    A run of the layer takes a share of the cores, one of WORKERS: one may go on while the walk rounds on the other share, none while it
    sums moments on all cores, and all of them once the walk waits for what they find. So no core is idle for long, and none is shared.
    """

    def __init__(self) -> None:
        self._found: Future[Original] | None = None
        self._thread: Thread | None = None
        self._cores = 0  # of the walk's thread, where a layer is on its way
        self._turns = Condition()
        self._most, self._running, self._ended = 1, 0, False  # runs at a time

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        with self._turns:
            self._ended = True
            self._turns.notify_all()
        if self._thread:
            self._thread.join()

    def start(self, layer: Layer, run: Callable[[Layer], Original]) -> None:
        """Begin with ``run`` of ``layer``, which nobody else has."""
        layer.module.register_forward_pre_hook(lambda *_: self._enter())
        layer.module.register_forward_hook(lambda *_: self._leave(), always_call=True)
        found: Future[Original] = Future()
        self._found, self._cores = found, torch.get_num_threads()

        def work() -> None:
            try:
                with torch_threads(self._cores):
                    found.set_result(run(layer))
            except BaseException as error:  # told to whoever takes it
                found.set_exception(error)

        self._thread = Thread(target=work)
        self._thread.start()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """While open, the caller leaves a share of the cores to the layer on its way, if there is one."""
        with torch_threads(max(1, self._cores // WORKERS)) if self._cores else nullcontext():
            yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While open, no other run begins, and the caller has all cores."""
        with self._at_most(0), torch_threads(self._cores) if self._cores else nullcontext():
            yield

    def take(self, index: int) -> Original | None:
        """What was found of layer ``index``, once it is, or None where nobody has begun with it."""
        found, self._found, self._cores = self._found, None, 0
        with self._at_most(WORKERS):
            original = found.result() if found else None
        return original if original and original.index == index else None

    @contextmanager
    def _at_most(self, runs: int) -> Iterator[None]:
        before = self._most
        self._allow(runs)
        try:
            yield
        finally:
            self._allow(before)

    def _allow(self, runs: int) -> None:
        with self._turns:
            self._most = runs
            self._turns.notify_all()

    def _enter(self) -> None:
        with self._turns:
            self._turns.wait_for(lambda: self._ended or self._running < self._most)
            self._running += 1
            if self._ended:
                raise InterruptedError("the walk has ended")

    def _leave(self) -> None:
        with self._turns:
            self._running -= 1
            self._turns.notify_all()
