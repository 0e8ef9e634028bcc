"""A layer's weights are read while the previous one is quantised; a GPU copies them from page-locked memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mbq_gguf.models.lazy import FileTensor, file_tensors, lazy_tensors, materialise, tensors_of
from mbq_gguf.models.read_ahead import ALIGNED, ReadAhead, page_locked
from safetensors.torch import save_file
from torch import nn

CPU = torch.device("cpu")
READ = FileTensor.__call__


@pytest.fixture
def module(tmp_path: Path) -> nn.Module:
    """A parameter that is cut out of two stacked tensors, a single number, and what is in no file."""
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.randn(6, 5, generator=draw).bfloat16() for name in ("expert.0", "expert.1")}
    save_file(found | {"limit": torch.tensor(2.5)}, tmp_path / "one.safetensors")
    stored = lazy_tensors([tmp_path / "one.safetensors"])
    made = nn.Module()
    stack = torch.stack([stored["expert.0"], stored["expert.1"]])
    made.register_parameter("cut", nn.Parameter(stack.chunk(2, dim=1)[0], requires_grad=False))
    made.register_parameter("limit", nn.Parameter(stored["limit"], requires_grad=False))
    made.register_buffer("made", torch.ones(2))
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from files, by name."""
    names: list[str] = []

    def read(leaf: FileTensor, made: dict[int, object]) -> object:
        if id(leaf) not in made:
            names.append(leaf.name)
        return READ(leaf, made)

    monkeypatch.setattr(FileTensor, "__call__", read)
    return names


def test_all_that_a_module_is_made_of_is_read_once(module: nn.Module, seen: list[str]) -> None:
    """Each tensor of stacked and cut ones; nothing of the model changes, and a CPU has nothing to take."""
    ahead = ReadAhead(module, CPU)
    ahead.wait()
    assert sorted(seen) == ["expert.0", "expert.1", "limit"]
    assert module.get_parameter("cut").is_meta
    assert ahead.taken() == {}


def test_what_was_read_ahead_is_not_read_again(module: nn.Module, seen: list[str]) -> None:
    found = {id(leaf): leaf for _, _, value in tensors_of(module) for leaf in file_tensors(value)}
    wholes = [leaf({}) for leaf in found.values()]
    copies = page_locked(wholes)
    assert all(torch.equal(copy, whole) and copy.data_ptr() % ALIGNED == 0 for copy, whole in zip(copies, wholes, strict=True))
    seen.clear()
    materialise(module, CPU, torch.float32, made=dict(zip(found, copies, strict=True)))
    assert seen == []
    assert torch.equal(module.get_parameter("cut"), torch.stack(wholes[:2])[:, :3].float())
    assert module.get_parameter("limit").item() == 2.5


@pytest.mark.gpu
def test_a_card_takes_what_was_read_ahead(module: nn.Module, seen: list[str]) -> None:
    ahead = ReadAhead(module, torch.device("cuda"))
    made = ahead.taken()
    assert made
    assert all(copy.is_cuda for copy in made.values())
    assert ahead.taken() == {}
    seen.clear()
    materialise(module, torch.device("cuda"), torch.float32, made=made)
    assert seen == []
    assert module.get_parameter("limit").is_cuda
    assert module.get_parameter("limit").item() == 2.5
