"""A run that goes on behind a layer with experts writes the bytes of one that was not interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mbq_gguf.calibration import batches
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.models import load
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.workdir import open_workdir
from recipe import write
from recipes import RECIPES


@pytest.mark.parametrize("propagate", [True, False], ids=["quantised inputs", "original inputs"])
def test_goes_on_with_the_same_bytes(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: bool) -> None:
    """With Hessians of the original model's inputs, its experts also see tokens that did not choose them. Products with other numbers of
    rows have other last bits, so layer 1 is given those of layer 0 only if its experts see as many when it is restored."""
    monkeypatch.setattr(batches, "TOKENS", 200)
    loaded = load(write(RECIPES["Qwen3-VL-MoE"], tmp_path / "checkpoint"))
    work = open_workdir(tmp_path / "work", {})
    settings = QuantiseSettings(synthetic=0, propagate_error=propagate)
    whole = quantise(loaded, samples, settings, work).tensors
    (tmp_path / "work" / "layer-0001.safetensors").unlink()
    resumed = quantise(loaded, samples, settings, work).tensors
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert whole.keys() == resumed.keys()
