"""The check of a checkpoint's weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mbq_gguf.errors import UserError
from mbq_gguf.models.checks import check_finite
from safetensors import safe_open
from safetensors.torch import save_file

COLUMNS = 1003  # an odd number: more than vectors hold, and something left behind them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_weight_in_many_that_is_no_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wherever it lies; the largest numbers of a type are numbers."""
    file = tmp_path / "weights.safetensors"
    sound = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    sound[0, :2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    save_file({"a": sound, "bound": torch.tensor(math.inf, dtype=dtype), "none": torch.empty(0, 3, dtype=dtype)}, file)
    check_finite([file])
    for place in (0, COLUMNS, 3 * COLUMNS - 1):
        for value in (math.nan, math.inf, -math.inf):
            spoilt = sound.clone()
            spoilt.view(-1)[place] = value
            save_file({"a": sound, "b": spoilt}, file)
            with pytest.raises(UserError, match=r"the weight b in .* has NaN or infinite values"):
                check_finite([file])


def test_the_bar_fills(tmp_path: Path) -> None:
    """Tensors of 3 MB less a few bytes, which the header makes up for: the file's own size would never be reached."""
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(500_000), "b": torch.zeros(249_990)}, file)
    assert file.stat().st_size > 3e6
    told: list[tuple[int, int]] = []
    check_finite([file], lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)


@pytest.mark.parametrize(("mapped", "openings"), [(64 * 10**6, 2), (12, 4), (0, 6)])
def test_a_file_is_opened_as_often_as_memory_wants(mapped: int, openings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of three tensors of 12 bytes, of which so many bytes and one more may be mapped; what is found stays the same."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file({name: torch.ones(3) for name in "xyz"}, file)
    opened = []

    def counted(file: str, framework: str) -> object:
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr("mbq_gguf.models.lazy.MAPPED", mapped)
    monkeypatch.setattr("mbq_gguf.models.lazy.safe_open", counted)
    check_finite(files)
    assert len(opened) == openings
    save_file({"x": torch.ones(3), "y": torch.ones(3), "z": torch.full((3,), math.nan)}, files[1])
    with pytest.raises(UserError, match=r"the weight z in .*b\.safetensors has NaN"):
        check_finite(files)
