"""Triton's kernels against PyTorch's operations that they stand for: on a card where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.rounding import descent, gptq, ranges, refit
from mbq_gguf.rounding.kernels import Kernels, all_kernels
from mbq_gguf.rounding.sequence import Refinement, refined

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.importorskip("triton")
ROWS = 16
SUMS = 1e-5  # sums of float32 in another order: measured 4e-7 of the largest, where that is not rounded to what a file holds
SEARCHED = [(kind, True) for kind in ("MBQ3S", "MBQ3", "Q4_0", "Q4_1", "Q3_K", "Q4_K", "Q6_K")] + [("Q3_K", False), ("Q4_K", False)]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("its interpreter does not know this NumPy")
    return all_kernels()


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations for what is compared, on a card too."""
    for module in (descent, gptq, ranges, refit):
        monkeypatch.setattr(module, "kernels_for", lambda like: None)


def problem(columns: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and a Hessian, of inputs that share some directions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 24, generator=draw) @ torch.randn(24, columns, generator=draw) + torch.randn(600, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw).to(DEVICE), (x.t() @ x).to(DEVICE)


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], error: float = 0.0) -> None:
    """All but equal: within ``error`` of the largest."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=error * float(other.abs().max()) if other.numel() else 0)


@pytest.mark.parametrize(("kind", "stepped"), SEARCHED)
def test_search(kernels: Kernels, kind: str, stepped: bool) -> None:
    grid = grid_for(quant_type_for(kind, 256))
    weight, hessian = problem(grid.group)
    weight[0], weight[1] = 0.0, 0.5  # of no range
    steps = (0.01 + 0.02 * torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(1))).half().float().to(DEVICE) if stepped else None
    expected = ranges.search_range(grid, weight, hessian.diagonal(), steps)
    # Sums are in another order; no row has two candidates so near one another that this matters.
    same(kernels.search(grid, weight, hessian.diagonal(), steps, ranges.shares_of(grid), ranges.TURNS), expected, SUMS)


def test_search_of_blocks_with_costs_of_their_own(kernels: Kernels) -> None:
    grid = grid_for(quant_type_for("Q4_K", 256))
    weight, hessian = problem(256, rows=5)
    blocks, costs = weight.t().contiguous().t().reshape(5, -1, grid.group), hessian.diagonal().view(-1, grid.group)
    expected = ranges.search_range(grid, blocks, costs)
    same(kernels.search(grid, blocks, costs, None, ranges.shares_of(grid), ranges.TURNS), expected, SUMS)


@pytest.mark.parametrize("kind", ["MBQ3S", "Q3_K", "W4A8"])
def test_columns_of_gptq(kernels: Kernels, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 128 if kind != "Q3_K" else 256))
    weight, hessian = problem(128, rows=ROWS + 3)
    factor, group = gptq.inverse_factor(hessian, 0.01), range(0, min(grid.group, 128))
    scale = weight.abs().amax(dim=1) / (grid.high - grid.low)
    scale[1] = 0.0
    line = torch.stack([scale, weight.amin(dim=1) if grid.offset.free else torch.zeros_like(scale)])[:, None]
    results = []
    for fused in (True, False):
        work = weight.t().contiguous()
        codes, errors = torch.zeros_like(work), torch.zeros_like(work)
        if fused:
            kernels.round_group(work, factor, line, codes, errors, group.start, len(group), grid.low, grid.high)
        else:
            gptq._round_group(grid, work, factor, line, codes, errors, group)
        results.append((codes, errors, work[group.stop :]))
    assert results[0][0].unique().numel() > 4
    assert results[0][0].equal(results[1][0])
    same(*results, SUMS)  # PyTorch contracts products and sums in some of these updates, by device and place


@pytest.mark.parametrize("kind", ["MBQ3_64", "Q4_0"])
def test_columns_of_descent(kernels: Kernels, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 64))
    weight, hessian = problem(64, rows=ROWS + 3)
    coded = gptq.code_gptq(weight, gptq.inverse_factor(hessian, 0.01), grid, ranges.searched(grid))
    scales, codes = coded.scale.repeat_interleave(grid.group, 1).t().contiguous(), coded.codes.t().contiguous()
    slope = (hessian @ (weight - coded.values(grid)).t()).contiguous()
    better, changes = descent._descend_columns(grid, slope.clone(), hessian, scales, codes)
    assert not better.equal(codes)
    same((kernels.descend_columns(slope, hessian, scales, codes, grid.low, grid.high), codes), (changes, better))


@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3_64", "Q4_1"])
def test_systems_and_their_steps(kernels: Kernels, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 256))
    weight, hessian = problem(256, rows=5)
    coded = gptq.code_gptq(weight, gptq.inverse_factor(hessian, 0.01), grid, ranges.searched(grid))
    count = 2 * coded.scale.shape[1]
    system, found = (torch.zeros(5, count, count, dtype=torch.float64, device=DEVICE) for _ in range(2))
    right = torch.zeros(5, count, dtype=torch.float64, device=DEVICE)
    refit._fill(system, right, weight, coded.codes, coded.scale, coded.offset, hessian)
    kernels.fill(found, coded.codes, hessian, count // 2)
    error = (found - system).tril().abs().amax() / system.abs().amax()
    assert error < 2e-6  # float32 sums of 64 x 64 products: measured 2e-7 to 5e-7
    system.diagonal(dim1=1, dim2=2).mul_(1.01)
    lower = torch.linalg.cholesky_ex(system).L.contiguous()
    halfway = torch.linalg.solve_triangular(lower, right[..., None], upper=False)[..., 0]
    left = halfway.clone()
    steps = kernels.take_steps(left, lower, coded.scale, coded.offset, grid.held_pair is not None)
    same((*steps, left), refit._take_steps(grid, halfway, lower, coded.scale, coded.offset))


@pytest.mark.parametrize("turned", [False, True])
def test_carry(kernels: Kernels, turned: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    later, factor, errors = (torch.randn(size, generator=draw).to(DEVICE) for size in ((70, 150), (70, 64), (64, 150)))
    factor = factor.t().contiguous().t() if turned else factor
    expected = later.double() - factor.double() @ errors.double()
    kernels.carry(later, factor, errors)
    same((later.double(),), (expected,), 1e-6)  # float32 sums of 64 products: measured 2e-7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3", "Q4_0", "Q4_K"])
def test_whole_rounding_on_a_card(kernels: Kernels, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as PyTorch's operations; and a row comes out the same whichever other blocks of rows are rounded with it."""
    grid, how = grid_for(quant_type_for(kind, 1024)), Refinement(0.01, clip=True, error_correction=0.5, refits=2)
    weight, hessian = problem(1024, rows=3 * gptq.ROWS_AT_ONCE)
    plain = gptq.objective(weight, refined(weight, Moments(hessian), grid, how).values(grid), hessian)
    for module in (descent, gptq, ranges, refit):
        monkeypatch.setattr(module, "kernels_for", lambda like: kernels)
    gptq._recorded.cache_clear()
    coded = refined(weight, Moments(hessian), grid, how)
    assert gptq.objective(weight, coded.values(grid), hessian) == pytest.approx(plain, rel=1e-3)  # near ties fall otherwise
    some = refined(weight[: gptq.ROWS_AT_ONCE], Moments(hessian), grid, how)
    same((some.codes, some.scale), (coded.codes[: gptq.ROWS_AT_ONCE], coded.scale[: gptq.ROWS_AT_ONCE]))
    gptq._recorded.cache_clear()
