"""Activations that exceed the memory limit are kept in files, and results do not change."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_gguf.calibration import spill
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.spill import kept, spilling
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings


def mapped(folder: Path) -> int:
    """How many mappings there are of files in ``folder``, which have lost their names."""
    gc.collect()
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_beyond_the_limit_a_file_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 7)
    with spilling(1 << 62, tmp_path) as room:
        assert kept(x) is x
    monkeypatch.setattr(spill, "SMALLEST", 1)
    with spilling(0, tmp_path) as room:
        found = kept(x), kept(x, torch.bfloat16)
        assert room.spilled == x.numel() * 6
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], x.bfloat16())
    assert not os.listdir(tmp_path)
    assert mapped(tmp_path) == 2
    del found
    assert mapped(tmp_path) == 0


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with spilling(0, tmp_path), pytest.raises(UserError, match=r"do not fit into memory, nor into .*No space left.*--work-dir"):
        kept(torch.zeros(1 << 20))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("token_weights", ["uniform", "gradient"])
def test_the_same_bytes(
    token_weights: str, tiny: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, inputs of both models and gradients: at least every sample's input of each layer's widest linear, twice."""
    monkeypatch.setattr(spill, "SMALLEST", 1)
    settings = QuantiseSettings(synthetic=0, clip=False, refits=0, token_weights=token_weights)  # type: ignore[arg-type]
    plain = quantise(tiny, samples[:2], settings).quantised
    with spilling(0, tmp_path) as room:
        found = quantise(tiny, samples[:2], settings).quantised
    assert all(np.array_equal(found[name].data, tensor.data) for name, tensor in plain.items())
    assert room.spilled > 2 * 3 * 192 * 4 * 200
    assert mapped(tmp_path) == 0


@pytest.mark.gpu
def test_a_card_keeps_what_it_has_room_for(tmp_path: Path) -> None:
    x = torch.randn(3, 5, device="cuda")
    with spilling(1 << 62, tmp_path, card=0):
        assert kept(x) is x
        assert kept(x, torch.bfloat16).is_cuda
    with spilling(1 << 62, tmp_path, card=1 << 60):
        assert kept(x).device.type == "cpu"


@pytest.mark.gpu
def test_where_a_card_keeps_activations_is_all_the_same(
    tiny_dir: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host, on the card, and every other time on the card: the same bytes, and the model as it was."""
    loaded = load(tiny_dir, "cuda")
    head = loaded.decoder.head.weight.clone()
    settings = QuantiseSettings(synthetic=2)
    plain = quantise(loaded, samples[:2], settings).quantised
    for rooms in ([1 << 60], [0, 1 << 60]):
        turns = itertools.cycle(rooms)
        monkeypatch.setattr(spill, "available", lambda device, turns=turns: next(turns))
        with spilling(1 << 62, tmp_path, card=0):
            found = quantise(loaded, samples[:2], settings).quantised
        assert all(np.array_equal(found[name].data, tensor.data) for name, tensor in plain.items())
    assert torch.equal(loaded.decoder.head.weight, head)
