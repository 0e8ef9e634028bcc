"""A layer's weights are read while the previous one is quantised; a GPU copies them from page-locked memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.models.lazy import FileTensor, ReadCache, file_tensors, lazy_tensors, materialise, materialised, tensors_of
from mbq_gguf.models.read_ahead import ALIGNED, ReadAhead, page_locked
from safetensors.torch import save_file
from torch import nn

CPU = torch.device("cpu")
READ = FileTensor._read


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

    def read(leaf: FileTensor, files: dict[Path, Any]) -> torch.Tensor:
        names.append(leaf.name)
        return READ(leaf, files)

    monkeypatch.setattr(FileTensor, "_read", read)
    return names


def test_all_that_a_module_is_made_of_is_read_once(module: nn.Module, seen: list[str]) -> None:
    """Each tensor of stacked and cut ones; nothing of the model changes, and a CPU has nothing to take."""
    ahead = ReadAhead(module, CPU)
    ahead.wait()
    assert sorted(seen) == ["expert.0", "expert.1", "limit"]
    assert module.get_parameter("cut").is_meta
    assert ahead.taken() == {}


def test_what_was_read_ahead_is_not_read_again(module: nn.Module, seen: list[str]) -> None:
    found = {id(leaf): leaf for leaf in file_tensors([value for _, _, value in tensors_of(module)])}
    wholes = [leaf(ReadCache()) for leaf in found.values()]
    _, copies = page_locked(wholes, torch.empty(0, dtype=torch.uint8))
    assert all(torch.equal(copy, whole) and copy.data_ptr() % ALIGNED == 0 for copy, whole in zip(copies, wholes, strict=True))
    seen.clear()
    materialise(module, CPU, torch.float32, staged=dict(zip(found, copies, strict=True)))
    assert seen == []
    assert torch.equal(module.get_parameter("cut"), torch.stack(wholes[:2])[:, :3].float())
    assert module.get_parameter("limit").item() == 2.5


def test_a_copy_lives_until_its_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three matrices, the first of which two parameters are cut from, although the caller holds what was staged."""
    save_file({name: torch.ones(4, 4) for name in ("fused", "other", "last")}, tmp_path / "one.safetensors")
    stored = lazy_tensors([tmp_path / "one.safetensors"])
    halves = stored["fused"].chunk(2)
    values = {"first": halves[0], "other": stored["other"], "second": halves[1], "last": stored["last"]}
    made = nn.Module()
    for name, value in values.items():
        made.register_parameter(name, nn.Parameter(value, requires_grad=False))
    leaves = {id(leaf): leaf for leaf in file_tensors(list(values.values()))}
    assert [leaf.name for leaf in leaves.values()] == ["fused", "other", "last"]  # each once
    staged = {key: leaf(ReadCache()).clone() for key, leaf in leaves.items()}
    alive: set[str] = set()
    for key, leaf in leaves.items():
        alive.add(leaf.name)
        weakref.finalize(staged[key].untyped_storage(), alive.discard, leaf.name)
    seen = []

    def noted(*args: Any) -> torch.Tensor:
        found = materialised(*args)
        seen.append(set(alive))
        return found.double()  # memory of its own

    monkeypatch.setattr("mbq_gguf.models.lazy.materialised", noted)
    materialise(made, CPU, torch.float64, staged=staged)
    assert seen == [{"fused", "other", "last"}, {"fused", "last"}, {"last"}, set()]


@pytest.mark.gpu
def test_a_card_takes_what_was_read_ahead(module: nn.Module, seen: list[str]) -> None:
    ahead = ReadAhead(module, torch.device("cuda"))
    made = ahead.taken()
    assert made
    assert all(copy.is_cuda for copy in made.values())
    assert ahead.taken() == {}
    seen.clear()
    materialise(module, torch.device("cuda"), torch.float32, staged=made)
    assert seen == []
    assert module.get_parameter("limit").is_cuda
    assert module.get_parameter("limit").item() == 2.5


def test_memory_is_taken_anew_only_for_a_larger_layer() -> None:
    room = torch.empty(0, dtype=torch.uint8)
    places = []
    for count in (100, 100, 30, 200):
        room, (copy,) = page_locked([torch.arange(count)], room)
        assert copy.equal(torch.arange(count))
        places.append(copy.data_ptr())
    assert places[0] == places[1] == places[2] != places[3]


@pytest.mark.gpu
def test_memory_is_not_overwritten_while_a_card_reads_it(tmp_path: Path) -> None:
    """Half a gigabyte, which an H200 copies in 9 ms."""
    values = {f"layer.{number}": torch.full((2**28,), float(number), dtype=torch.float16) for number in range(4)}
    save_file(values, tmp_path / "one.safetensors")
    stored = lazy_tensors([tmp_path / "one.safetensors"])
    ahead: ReadAhead | None = None
    copies, places = [], set()
    for name in values:
        made = nn.Module()
        made.register_parameter("weight", nn.Parameter(stored[name], requires_grad=False))
        ahead = ReadAhead(made, torch.device("cuda"), ahead)
        ahead.wait()
        places.update(copy.data_ptr() for copy in ahead._made.values())
        copies += ahead.taken().values()
    assert len(places) == 1
    assert [(copy == number).all().item() for number, copy in enumerate(copies)] == [True] * 4
