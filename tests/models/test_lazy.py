"""Weights stay in their files until they are needed, whatever transformers does with them, and no more than needed is read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.lazy import LazyTensor, lazy_tensors, materialise
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What lies in files of two experts and a matrix."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 4, generator=draw).bfloat16() for name in ("expert.0", "expert.1", "matrix")}


@pytest.fixture
def stored(tensors: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, torch.Tensor]:
    save_file({name: tensors[name] for name in ("expert.0", "matrix")}, tmp_path / "one.safetensors")
    save_file({"expert.1": tensors["expert.1"]}, tmp_path / "two.safetensors")
    return lazy_tensors([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def read(value: torch.Tensor) -> torch.Tensor:
    assert isinstance(value, LazyTensor)
    assert value.is_meta
    return value.read()


def test_a_tensor_is_what_lies_in_the_file(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (stored[name].shape, stored[name].dtype) == (value.shape, value.dtype)
        assert torch.equal(read(stored[name]), value)


def test_operations_are_done_when_the_result_is_read(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    """Stacked, cut, turned and cast, as transformers does with experts and fused matrices."""

    def done(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        stack = torch.stack([found["expert.0"], found["expert.1"]])
        halves = stack.transpose(1, 2).contiguous().chunk(2, dim=1)
        return [stack[1], *halves, torch.cat([found["matrix"], stack[0]]).to(torch.float32), nn.Parameter(stack).detach()[0]]

    for ours, theirs in zip(done(stored), done(tensors), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(read(ours), theirs)


def test_what_is_in_a_file_is_not_changed(stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises(TypeError, match="cannot be changed"):
        stored["matrix"].zero_()
    assert copy.deepcopy(stored["matrix"]) is stored["matrix"]


def test_a_module_is_read_in_memory_of_its_own(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    module = nn.ModuleList([nn.Linear(4, 6, bias=False, device="meta") for _ in range(2)])
    for linear in module:
        linear.weight = nn.Parameter(stored["matrix"], requires_grad=False)
    module[1].weight = module[0].weight
    materialise(module, CPU, None)
    assert module[0].weight is module[1].weight  # shared before and behind
    module[0].weight.fill_(3.0)
    assert torch.equal(read(stored["matrix"]), tensors["matrix"])


def test_modules_are_left(stored: dict[str, torch.Tensor]) -> None:
    module = nn.ModuleList([nn.Linear(4, 6, bias=False, device="meta") for _ in range(2)])
    for linear in module:
        linear.weight = nn.Parameter(stored["matrix"], requires_grad=False)
    materialise(module, CPU, torch.float32, left=[module[1]])
    assert (module[0].weight.dtype, module[0].weight.is_meta, module[1].weight.is_meta) == (torch.float32, False, True)


def test_layers_are_in_files_but_while_they_are_held(tiny: LoadedModel) -> None:
    layers = tiny.decoder.layers
    assert all(isinstance(parameter, LazyTensor) for parameter in layers.parameters())
    with tiny.whole():
        assert {(parameter.device.type, parameter.dtype) for parameter in layers.parameters()} == {("cpu", torch.bfloat16)}
    assert all(isinstance(parameter, LazyTensor) for parameter in layers.parameters())
    assert not any(isinstance(value, LazyTensor) for value in (tiny.decoder.norm.weight, tiny.decoder.head.weight))


@pytest.mark.parametrize(("most", "openings"), [(64 * 10**6, 1), (1000, 8)])
def test_a_file_is_opened_anew_for_some_bytes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, openings: int) -> None:
    """Not for each of 32 matrices of 256 bytes, but with the next one when more than ``most`` are mapped, as four of them are."""
    save_file({f"experts.{number}": torch.full((8, 8), float(number)) for number in range(32)}, tmp_path / "model.safetensors")
    found = lazy_tensors([tmp_path / "model.safetensors"])
    opened: list[str] = []

    def counted(file: str, framework: str) -> object:
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr("mbq_gguf.models.lazy.safe_open", counted)
    monkeypatch.setattr("mbq_gguf.models.lazy.MAPPED", most)
    whole = torch.stack([found[f"experts.{number}"] for number in range(32)])
    assert torch.equal(read(whole)[:, 0, 0], torch.arange(32.0))
    assert len(opened) == openings
