"""No more of a checkpoint is in memory than one decoder layer: every weight that is read is tracked until it is freed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.models import LoadedModel, lazy
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings

FAST = QuantiseSettings(synthetic=0, clip=False, refits=0)


class Count:
    """Bytes of the decoder's matrices that are alive after they were read, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = self.reads = 0

    def add(self, tensor: torch.Tensor) -> None:
        self.reads += 1
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self.drop, tensor.nbytes)

    def drop(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    counted = Count()
    before = lazy.materialised

    def read_to(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None, made: lazy.ReadCache) -> torch.Tensor:
        found = before(value, device, dtype, made)
        counted.add(found)
        return found

    monkeypatch.setattr(lazy, "materialised", read_to)
    gc.collect()
    return counted


@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
@pytest.mark.parametrize(
    "settings",
    [FAST, replace(FAST, method="mbq", rounding="nearest", search_samples=1, rotate="offline"), replace(FAST, token_weights="token")],
    ids=["gptq", "mbq rotated", "token weights"],
)
def test_one_layer_at_a_time(
    count: Count, settings: QuantiseSettings, ahead: bool, tiny: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, where a transformed layer is compared with what it was, or the original's next layer runs in a thread; of three in all."""
    monkeypatch.setattr("mbq_gguf.walk.layer.helps", lambda device: ahead)
    a_layer = sum(parameter.numel() * 4 for parameter in tiny.decoder.layers[0].parameters())
    quantise(tiny, samples[:1], settings)
    assert count.reads >= 3 * len(list(tiny.decoder.layers[0].parameters()))
    two = settings.rotate != "none" or (ahead and settings.rounding == "gptq")
    assert a_layer <= count.most <= (2.1 if two else 1.1) * a_layer


def test_the_whole_model_is_told_apart(count: Count, tiny: LoadedModel) -> None:
    with tiny.whole(torch.float32):
        assert count.most == sum(parameter.numel() * 4 for parameter in tiny.decoder.layers.parameters())
    assert count.now == 0
