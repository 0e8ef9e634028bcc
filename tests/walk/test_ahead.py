"""The original's next layer in a thread beside the rounding: the same bytes, and no thread outlives the walk."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.observe import Observed
from mbq_gguf.calibration.stream import capture, run_batch, working_layer
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.walk import layer as steps
from mbq_gguf.walk.ahead import Ahead, Original

ENOUGH = 100_000  # runs of a layer: minutes


@pytest.mark.parametrize("method", ["rtn", "mbq"])
def test_the_bytes_are_those_of_one_after_the_other(
    tiny: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    monkeypatch.setattr("mbq_gguf.transforms.equalise.EXPONENTS", (0.0, 0.3))
    original, in_thread = steps.run_original, []

    def spied(walk: Any, layer: Layer, streams: Any) -> Original:
        in_thread.append(threading.current_thread() is not threading.main_thread())
        return original(walk, layer, streams)

    monkeypatch.setattr(steps, "run_original", spied)
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(steps, "helps", lambda device, ahead=ahead: ahead)
        found.append(quantise(tiny, samples[:2], QuantiseSettings(synthetic=0, method=method)))
    assert in_thread == [False] * 3 + [False, True, True]
    assert found[0].facts == found[1].facts
    assert found[0].tensors.keys() == found[1].tensors.keys()
    assert all(torch.equal(found[1].tensors[name], tensor) for name, tensor in found[0].tensors.items())


def test_a_walk_that_ends_early_waits_for_one_run_at_most(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams, runs = list(capture(tiny, samples[:1])), []

    def endless(layer: Layer) -> Original:
        while len(runs) < ENOUGH:
            run_batch(layer, streams)
            runs.append(layer.index)
            begun.set()
        raise AssertionError("nobody has ended it")

    begun, ahead = threading.Event(), Ahead()
    with ahead:
        ahead.start(working_layer(tiny, 0), endless)
        begun.wait()
    assert 0 < len(runs) < ENOUGH
    with pytest.raises(InterruptedError):
        ahead.take(0)


def test_it_rests_while_the_walk_has_all_cores(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams, found = list(capture(tiny, samples[:1])), threading.Event()

    def run(layer: Layer) -> Original:
        run_batch(layer, streams)
        found.set()
        return Original(0, streams, Observed(), [])

    with Ahead() as ahead:
        with ahead.resting():
            ahead.start(working_layer(tiny, 0), run)
            assert not found.wait(0.2)
        assert ahead.take(0) is not None
        assert found.is_set()


def test_an_error_reaches_the_walk(tiny: LoadedModel) -> None:
    def failing(layer: Layer) -> Original:
        raise OSError("the disk is gone")

    with Ahead() as ahead:
        ahead.start(working_layer(tiny, 0), failing)
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(0)
