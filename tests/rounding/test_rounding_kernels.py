"""Kernels against the PyTorch operations that they replace: Triton's on a GPU if there is one, else interpreted, and compiled C."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.rounding import descent, gptq, inverse, ranges, refit
from mbq_gguf.rounding.kernels import Kernels, compiled, kernels_for, of_triton
from mbq_gguf.rounding.kernels.group import Group
from mbq_gguf.rounding.sequence import Refinement, refined
from mbq_gguf.threads import torch_threads

CARD = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 16
SUMS = 1e-5  # sums of float32 in another order: measured 4e-7 of the largest, where that is not rounded to what a file holds
SEARCHED = [(kind, True) for kind in ("MBQ3S", "MBQ3", "Q4_0", "Q4_1", "Q3_K", "Q4_K", "Q6_K")] + [("Q3_K", False), ("Q4_K", False)]


@pytest.fixture(scope="module", params=["triton", "compiled"])
def kind_of_kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def device(kind_of_kernels: str) -> str:
    return CARD if kind_of_kernels == "triton" else "cpu"


@pytest.fixture(scope="module")
def kernels(kind_of_kernels: str) -> Kernels:
    if kind_of_kernels == "compiled":
        found = kernels_for(torch.empty(0))
        assert found is not None, "no C compiler"
        return found
    triton = pytest.importorskip("triton")
    if CARD == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("its interpreter does not know this NumPy")
    return of_triton()


def use(found: Kernels | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (descent, gptq, ranges, refit):
        monkeypatch.setattr(module, "kernels_for", lambda like: found)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations for what is compared, on a card too."""
    use(None, monkeypatch)


def problem(device: str, columns: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and a Hessian, of inputs that share some directions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 24, generator=draw) @ torch.randn(24, columns, generator=draw) + torch.randn(600, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw).to(device), (x.t() @ x).to(device)


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], error: float = 0.0) -> None:
    """All but equal: within ``error`` of the largest."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=error * float(other.abs().max()) if other.numel() else 0)


@pytest.mark.parametrize(("kind", "stepped"), SEARCHED)
def test_search(kernels: Kernels, device: str, kind: str, stepped: bool) -> None:
    grid = grid_for(quant_type_for(kind, 256))
    weight, hessian = problem(device, grid.group)
    weight[0], weight[1] = 0.0, 0.5  # of no range
    steps = (0.01 + 0.02 * torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(1))).half().float().to(device) if stepped else None
    expected = ranges.search_range(grid, weight, hessian.diagonal(), steps)
    # Sums are in another order; no row has two candidates so near one another that this matters.
    same(kernels.search(grid, weight, hessian.diagonal(), steps, ranges.shares_of(grid), ranges.TURNS), expected, SUMS)


def test_search_of_blocks_with_costs_of_their_own(kernels: Kernels, device: str) -> None:
    grid = grid_for(quant_type_for("Q4_K", 256))
    weight, hessian = problem(device, 256, rows=5)
    blocks, costs = weight.t().contiguous().t().reshape(5, -1, grid.group), hessian.diagonal().view(-1, grid.group)
    expected = ranges.search_range(grid, blocks, costs)
    same(kernels.search(grid, blocks, costs, None, ranges.shares_of(grid), ranges.TURNS), expected, SUMS)


@pytest.mark.parametrize("kind", ["MBQ3S", "Q3_K", "W4A8"])
def test_columns_of_gptq(kernels: Kernels, device: str, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 128 if kind != "Q3_K" else 256))
    weight, hessian = problem(device, 128, rows=ROWS + 3)
    factor = inverse.inverse_factor(hessian, 0.01)
    scale = weight.abs().amax(dim=1) / (grid.high - grid.low)
    scale[1] = 0.0
    line = torch.stack([scale, weight.amin(dim=1) if grid.offset.free else torch.zeros_like(scale)])[:, None]
    results = []
    for fused in (True, False):
        work = weight.t().contiguous()
        codes, errors = torch.zeros_like(work), torch.zeros_like(work)
        group = Group(work, factor, line, codes, errors, range(min(grid.group, 128)), grid.low, grid.high)
        if fused:
            kernels.round_group(group)
        else:
            gptq._round_group(grid, group)
        results.append((codes, errors, work[group.columns.stop :]))
    assert results[0][0].unique().numel() > 4
    assert results[0][0].equal(results[1][0])
    same(*results, SUMS)  # PyTorch contracts products and sums in some of these updates, by device and place


@pytest.mark.parametrize("kind", ["MBQ3_64", "Q4_0"])
def test_columns_of_descent(kernels: Kernels, device: str, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 64))
    weight, hessian = problem(device, 64, rows=ROWS + 3)
    coded = gptq.code_gptq(weight, inverse.inverse_factor(hessian, 0.01), grid, ranges.searched(grid))
    scales, codes = coded.scale.repeat_interleave(grid.group, 1).t().contiguous(), coded.codes.t().contiguous()
    slope = (hessian @ (weight - coded.values(grid)).t()).contiguous()
    better, changes = descent._descend_columns(grid, slope.clone(), hessian, scales, codes)
    assert not better.equal(codes)
    same((kernels.descend_columns(slope, hessian, scales, codes, grid.low, grid.high), codes), (changes, better))


@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3_64", "Q4_1"])
def test_systems_and_their_steps(kernels: Kernels, device: str, kind: str) -> None:
    grid = grid_for(quant_type_for(kind, 256))
    weight, hessian = problem(device, 256, rows=5)
    coded = gptq.code_gptq(weight, inverse.inverse_factor(hessian, 0.01), grid, ranges.searched(grid))
    count = 2 * coded.scale.shape[1]
    system, found = (torch.zeros(5, count, count, dtype=torch.float64, device=device) for _ in range(2))
    right = torch.zeros(5, count, dtype=torch.float64, device=device)
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


@pytest.mark.parametrize("numbers", [1, 36, compiled.LARGEST_SYSTEM])
def test_factors(kernels: Kernels, device: str, numbers: int) -> None:
    if kernels.factor is None:
        pytest.skip("a library does it")
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(ROWS, numbers, numbers, generator=draw, dtype=torch.float64)
    system, right = root @ root.mT + torch.eye(numbers), torch.randn(ROWS, numbers, generator=draw, dtype=torch.float64)
    system[1] *= -1
    lower, info = torch.linalg.cholesky_ex(system)
    expected = lower, torch.linalg.solve_triangular(lower, right[..., None], upper=False)[..., 0]
    found = kernels.factor(system.tril() + torch.randn_like(system).triu(1), right.clone())
    assert found is not None
    assert found[2].equal(info == 0)
    assert not found[2].all()
    for one, other in zip((found[0].tril(), found[1]), expected, strict=True):
        same((one[info == 0],), (other[info == 0],), 1e-12)  # float64 in another order: measured 3e-15
    assert kernels.factor(torch.eye(compiled.LARGEST_SYSTEM + 1)[None], torch.ones(1, compiled.LARGEST_SYSTEM + 1)) is None


@pytest.mark.parametrize("turned", [False, True])
def test_carry(kernels: Kernels, device: str, turned: bool) -> None:
    if kernels.carry is None:
        pytest.skip("a library's product does it")
    draw = torch.Generator().manual_seed(0)
    later, factor, errors = (torch.randn(size, generator=draw).to(device) for size in ((70, 150), (70, 64), (64, 150)))
    factor = factor.t().contiguous().t() if turned else factor
    expected = later.double() - factor.double() @ errors.double()
    kernels.carry(later, factor, errors)
    same((later.double(),), (expected,), 1e-6)  # float32 sums of 64 products: measured 2e-7


@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3", "Q4_0", "Q4_K"])
def test_whole_rounding(kind_of_kernels: str, kernels: Kernels, device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as PyTorch's operations; and a row comes out the same whichever other rows are rounded with it, and by how many threads."""
    if kind_of_kernels == "triton" and device == "cpu":
        pytest.skip("takes minutes interpreted")
    grid, how = grid_for(quant_type_for(kind, 1024)), Refinement(0.01, clip=True, error_correction=0.5, refits=2)
    weight, hessian = problem(device, 1024, rows=3 * gptq.ROWS_AT_ONCE)
    plain = gptq.objective(weight, refined(weight, Moments(hessian), grid, how).values(grid), hessian)
    use(kernels, monkeypatch)
    gptq._recorded.cache_clear()
    with torch_threads(1):
        coded = refined(weight, Moments(hessian), grid, how)
    assert gptq.objective(weight, coded.values(grid), hessian) == pytest.approx(plain, rel=1e-3)  # near ties fall otherwise
    with torch_threads(3):
        some = refined(weight[: gptq.ROWS_AT_ONCE], Moments(hessian), grid, how)
    same((some.codes, some.scale), (coded.codes[: gptq.ROWS_AT_ONCE], coded.scale[: gptq.ROWS_AT_ONCE]))
    gptq._recorded.cache_clear()


@pytest.mark.parametrize("command", ["cc", "env cc"])
def test_a_compiler_may_be_several_words(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", command)
    monkeypatch.setenv("MBQ_GGUF_CACHE", str(tmp_path))
    assert compiled.library.__wrapped__() is not None
    assert len(list(tmp_path.rglob("*.so"))) == 1


@pytest.mark.parametrize("compiler", [None, Path("/bin/false"), Path("/nowhere/cc")])
def test_without_a_compiler_there_are_none(compiler: Path | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "c_compiler", lambda: compiler)
    monkeypatch.setenv("MBQ_GGUF_CACHE", str(tmp_path))
    assert compiled.library.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))
