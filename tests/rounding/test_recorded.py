"""Loops recorded as CUDA graphs: replaying gives what running would."""

from __future__ import annotations

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.rounding.gptq import Coded
from mbq_gguf.rounding.inverse import inverse_factor
from mbq_gguf.rounding.recorded import Recorded
from mbq_gguf.rounding.sequence import Refinement, recorded_refinement, refined, refined_by

COLUMNS = 512
HOW = Refinement(0.01, clip=True, error_correction=0.5, refits=2)


def problem(device: str) -> tuple[torch.Tensor, Moments]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(900, 32, generator=draw) @ torch.randn(32, COLUMNS, generator=draw) + torch.randn(900, COLUMNS, generator=draw)
    weight, other = torch.randn(96, COLUMNS, generator=draw), torch.randn(900, COLUMNS, generator=draw)
    return weight.to(device), Moments((x.t() @ x).to(device), (0.1 * other.t() @ x).to(device))


def test_without_a_card_it_is_the_function_itself() -> None:
    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.mul_(2),)

    x = torch.ones(3)
    assert Recorded(doubled)(x)[0] is x


@pytest.mark.gpu
def test_recordings_may_all_go_before_another_is_made() -> None:
    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2,)

    for _ in range(2):
        recorded = Recorded(doubled)
        assert [float(recorded(torch.full((1,), float(value), device="cuda"))[0]) for value in range(3)] == [0.0, 2.0, 4.0]
        del recorded


@pytest.mark.gpu
def test_unused_memory_is_given_back_for_a_recording() -> None:
    """With room for two and a half of the pieces that the function holds two at a time: running it leaves two unused, and recording it
    takes other two."""
    piece = 1 << 28  # bytes

    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ones(piece // 4, device="cuda") * x * 2,)

    recorded, values = Recorded(doubled), [torch.full((1,), float(value), device="cuda") for value in range(3)]
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 2.5 * piece
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert [float(recorded(value)[0].amax()) for value in values] == [0.0, 2.0, 4.0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3", "Q4_0", "Q3_K", "Q4_K", "Q6_K", "W4A8"])
def test_what_is_replayed_is_what_would_have_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_for(quant_type_for(kind, COLUMNS))
    weight, found = problem("cuda")

    def all_of(coded: Coded) -> list[torch.Tensor]:
        return [coded.codes, coded.scale, coded.offset, coded.steps]

    recorded = [all_of(refined(weight, found, grid, HOW)) for _ in range(3)]  # run, recorded, replayed
    monkeypatch.setattr(Recorded, "__call__", lambda self, *arguments: self.run(*arguments))
    for parts in zip(all_of(refined(weight, found, grid, HOW)), *recorded, strict=True):
        assert all(part.equal(parts[0]) for part in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3", "Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "W4A8"])
def test_what_is_replayed_of_a_whole_site_is_what_would_have_run(kind: str) -> None:
    grid = grid_for(quant_type_for(kind, COLUMNS))
    weight, found = problem("cuda")
    factor = inverse_factor(found.hessian, HOW.damping)
    run = refined_by(factor, weight, Moments(found.hessian), grid, HOW)
    refine = recorded_refinement(grid, HOW)
    for _ in range(3):  # run, recorded, replayed
        coded = refine(factor, weight, found.hessian)
        for name in ("codes", "scale", "offset", "steps"):
            assert getattr(coded, name).equal(getattr(run, name)), name


@pytest.mark.gpu
def test_a_card_chooses_as_the_cpu_does() -> None:
    grid = grid_for(quant_type_for("MBQ3S", COLUMNS))
    there, here = (refined(*problem(device), grid, HOW) for device in ("cuda", "cpu"))
    # A sum in another order turns a near tie now and then, and what follows from it in the row.
    assert (there.codes.cpu() == here.codes).float().mean() > 0.97
