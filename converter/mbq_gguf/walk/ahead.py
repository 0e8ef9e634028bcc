"""Runs the original model one layer ahead: its next layer runs in threads while the current one is rounded.

Rounding consists of many small operations in sequence, which leave the other cores of a CPU idle, and the original's layers do not depend
on it. Summing moments uses all cores, so the threads pause meanwhile; otherwise they would finish before the later matrices are rounded,
which would then run alone. The results have the same bits as without threads.
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

WORKERS = 2  # run batches of a layer in parallel, each on its share of the cores


@dataclass(frozen=True)
class Original:
    """Results of the original model for layer ``index``: the streams after it, its inputs and moments, and what its experts see of others'
    tokens."""

    index: int
    passed: list[Streamed]
    observed: Observed
    shares: list[float]


def helps(device: torch.device) -> bool:
    """Whether a thread beside the rounding has a core to itself and shares no state with it. GPUs have their own queues, the processes of a
    run communicate in order, and where calibration multiplies in bfloat16, PyTorch's switch for that affects the whole process.
    """
    return device.type == "cpu" and torch.get_num_threads() > 1 and parallel.world_size() == 1 and not fast_bfloat16()


def workers(device: torch.device) -> int:
    """The number of batches that run in parallel on ``device``."""
    return WORKERS if helps(device) else 1


class Ahead:
    """At most one layer runs ahead; when the block ends, so do its threads, if need be before the layer is finished.

    A run of a batch uses a share of the cores, one of WORKERS. While the walk rounds on the other share, one may run; while it sums moments
    on all cores, none; and while it waits for the results, all of them. So no core is idle for long, and none is shared.
    """

    def __init__(self) -> None:
        self._found: Future[Original] | None = None
        self._thread: Thread | None = None
        self._cores = 0  # cores of the walk's thread while a layer runs ahead
        self._turns = Condition()
        self._most, self._running, self._ended = 1, 0, False  # maximum number of runs at a time

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        with self._turns:
            self._ended = True
            self._turns.notify_all()
        if self._thread:
            self._thread.join()

    def start(self, layer: Layer, run: Callable[[Layer], Original]) -> None:
        """Start ``run`` for ``layer``, which must not be in use elsewhere."""
        layer.module.register_forward_pre_hook(lambda *_: self._enter())
        layer.module.register_forward_hook(lambda *_: self._leave(), always_call=True)
        found: Future[Original] = Future()
        self._found, self._cores = found, torch.get_num_threads()

        def work() -> None:
            try:
                with torch_threads(self._cores):
                    found.set_result(run(layer))
            except BaseException as error:  # raised again by take()
                found.set_exception(error)

        self._thread = Thread(target=work)
        self._thread.start()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """While open, the caller leaves a share of the cores to the layer that runs ahead, if there is one."""
        with torch_threads(max(1, self._cores // WORKERS)) if self._cores else nullcontext():
            yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While open, no other run starts, and the caller has all cores."""
        with self._at_most(0), torch_threads(self._cores) if self._cores else nullcontext():
            yield

    def take(self, index: int) -> Original | None:
        """Wait for the results of layer ``index``; None if it was not started."""
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
