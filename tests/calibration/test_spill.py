"""Activations beyond the memory that is allowed lie in files; what is computed from them is the same."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_gguf.calibration import spill
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.spill import spilling, to_host
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings


def mapped(folder: Path) -> int:
    """How many mappings there are of files in ``folder``, which have lost their names."""
    gc.collect()
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_beyond_the_limit_a_file_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 7)
    with spilling(1 << 62, tmp_path) as room:
        assert to_host(x) is x
    monkeypatch.setattr(spill, "SMALLEST", 1)
    with spilling(0, tmp_path) as room:
        found = to_host(x), to_host(x, torch.bfloat16)
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
        to_host(torch.zeros(1 << 20))
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
