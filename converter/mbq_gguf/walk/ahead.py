"""The original model one layer ahead: its next layer is run in a thread while this one is rounded.

Rounding is many small operations one after the other, which leave the other cores of a CPU idle; the original's layers depend on none of
them. Moments fill all cores by themselves, so the thread rests meanwhile: without that it would be done before the later matrices are
rounded, and these alone. What comes out is the same bits as in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import torch

from mbq_gguf import parallel
from mbq_gguf.calibration.observe import Observed
from mbq_gguf.calibration.precision import fast_bfloat16
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer


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


class Ahead:
    """At most one layer on its way; behind the block the thread has ended, if need be before its layer's end."""

    def __init__(self) -> None:
        self._found: Future[Original] | None = None
        self._ended = Event()
        self._free = Event()
        self._free.set()
        self._thread: Thread | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def start(self, layer: Layer, run: Callable[[Layer], Original]) -> None:
        """Begin with ``run`` of ``layer``, which nobody else has."""
        layer.module.register_forward_pre_hook(self._go_on)
        found: Future[Original] = Future()
        self._found = found

        def work() -> None:
            try:
                found.set_result(run(layer))
            except BaseException as error:  # told to whoever takes it
                found.set_exception(error)

        self._thread = Thread(target=work)
        self._thread.start()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While open, the thread begins with no other batch."""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def take(self, index: int) -> Original | None:
        """What was found of layer ``index``, once it is, or None where nobody has begun with it."""
        found, self._found = self._found, None
        original = found.result() if found else None
        return original if original and original.index == index else None

    def _go_on(self, *_: object) -> None:
        self._free.wait()
        if self._ended.is_set():
            raise InterruptedError("the walk has ended")
