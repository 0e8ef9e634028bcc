"""Range search, refitted parameters and the corrected weight, each against what it should improve."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.formats.grid import Grid
from mbq_gguf.formats.mbq3 import MBQ3_64
from mbq_gguf.formats.mbq3s import MBQ3S_64
from mbq_gguf.formats.quant_type import QuantType
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.rounding import gptq, inverse, sequence
from mbq_gguf.rounding.descent import descend
from mbq_gguf.rounding.gptq import Coded, code_gptq, objective
from mbq_gguf.rounding.inverse import damped, inverse_factor
from mbq_gguf.rounding.ranges import search_range
from mbq_gguf.rounding.refit import _fill, refit, refit_row_scale
from mbq_gguf.rounding.sequence import Refinement, corrected, refined

COLUMNS = 128
SUMS_OF_THE_CHANGE = 1e-6  # of a correction is what sums in float32 may change where zeros are left out; 0 here
OF_THE_CHANGE = 1e-3  # of a correction is what float32 sums of W y instead of y - x may change; 3.5e-4 here


@pytest.fixture(scope="module")
def grid() -> Grid:
    return grid_for(MBQ3_64)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int) -> torch.Tensor:
    """Correlated inputs [300, COLUMNS]."""
    return drawn(seed, 300, 16) @ drawn(seed + 1, 16, COLUMNS) + 0.3 * drawn(seed + 2, 300, COLUMNS)


@pytest.mark.parametrize("kind", ["MBQ3S_64", "Q4_0", "W4A8"])
def test_rows_come_out_the_same_whichever_others_are_rounded_with_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows, to the bit: several processes share a matrix in such pieces."""
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 16)
    grid, x, y = grid_for(quant_type_for(kind, COLUMNS)), inputs(0), inputs(5)
    found, how = Moments(x.t() @ x, (y - x).t() @ x), Refinement(0.01, True, 0.5, 2)
    weight = drawn(9, 72, COLUMNS)
    whole = refined(weight, found, grid, how)
    parts = [refined(weight[rows], found, grid, how) for rows in (slice(0, 16), slice(16, 64), slice(64, 72))]
    for name in ("codes", "scale", "offset", "steps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_the_systems_are_the_objectives() -> None:
    """The lower triangle of F H F^T and F H (w - v) with F written out, in float64; float32 sums come within 5e-7 of the largest; four
    times that is allowed."""
    grid, hessian = grid_for(quant_type_for("MBQ3S_64", COLUMNS)), inputs(0).t() @ inputs(0)
    weight, groups = drawn(9, 40, COLUMNS), COLUMNS // 32
    coded = code_gptq(weight, inverse_factor(hessian, 0.01), grid)
    system, right = torch.empty(40, 2 * groups, 2 * groups, dtype=torch.float64), torch.empty(40, 2 * groups, dtype=torch.float64)
    _fill(system, right, weight, coded.codes, coded.scale, coded.offset, hessian)
    own = torch.eye(groups, dtype=torch.float64).repeat_interleave(32, 1)  # [groups, columns]: which columns are a group's
    factor = torch.stack([coded.codes.double()[:, None] * own, own.expand(40, -1, -1)], 2).flatten(1, 2).flip(1)  # the last offset first
    change = (weight - coded.values(grid)).double()
    for found, expected in (
        (system.tril(), (factor @ hessian.double() @ factor.transpose(1, 2)).tril()),
        (right, (factor @ hessian.double() @ change[..., None])[..., 0]),
    ):
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_a_searched_range_is_never_worse_and_ignores_an_outlier(grid: Grid) -> None:
    blocks = drawn(0, 50, 64)
    blocks[0, 0] = 12.0  # one weight that the whole block would pay for

    costs = 1 + drawn(1, 64).abs()

    def error(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return (grid.codes(blocks, scale, offset) * scale + offset - blocks).square() @ costs

    plain, searched = error(*grid.fit(blocks)), error(*search_range(grid, blocks, costs))
    assert (searched <= plain).all()
    assert searched.sum() < 0.85 * plain.sum()
    assert float(search_range(grid, blocks, costs)[0][0]) < float(grid.fit(blocks)[0][0])


def test_range_search_finds_the_line_through_weights_that_matter(grid: Grid) -> None:
    # Column 0 is off the line that the others lie on, and its error costs next to nothing.
    codes = torch.randint(0, 8, (5, 64), generator=torch.Generator().manual_seed(2)).float()
    codes[:, 1], codes[:, 2] = 0, 7
    blocks = 0.5 * codes - 1.25
    blocks[:, 0] = 3.0
    costs = torch.ones(64)
    costs[0] = 1e-6
    scale, offset = search_range(grid, blocks, costs)
    assert scale.flatten().tolist() == [0.5] * 5
    assert offset.flatten().tolist() == [-1.25] * 5


@pytest.mark.parametrize("seed", range(3))
def test_range_search_lowers_gptqs_objective(grid: Grid, seed: int) -> None:
    basis = torch.linalg.qr(drawn(seed, COLUMNS, COLUMNS))[0]
    x = drawn(seed + 1, 600, COLUMNS) @ torch.diag(torch.arange(1, COLUMNS + 1) ** -0.5) @ basis  # a power law, as activations have
    weight = drawn(200 + seed, 40, COLUMNS)
    hessian = x.t() @ x
    factor = inverse_factor(hessian, 0.01)
    plain = objective(weight, code_gptq(weight, factor, grid).rounded(grid).weight, hessian)
    fit = partial(search_range, grid)
    assert objective(weight, code_gptq(weight, factor, grid, fit).rounded(grid).weight, hessian) < 0.9 * plain  # measured 0.78 to 0.82


def test_refit_finds_the_parameters_that_made_the_weight(grid: Grid) -> None:
    codes = torch.randint(0, 8, (6, COLUMNS), generator=torch.Generator().manual_seed(0)).float()
    scale, offset = 0.25 + torch.arange(12).view(6, 2) / 16, -torch.ones(6, 2)  # exact in fp16
    weight = codes * scale.repeat_interleave(64, 1) + offset.repeat_interleave(64, 1)
    x = inputs(3)
    found = refit(grid, weight, codes, scale * 1.25, offset + 0.125, x.t() @ x)
    # The ridge of 1e-4 holds the answer back by about as much of the distance.
    torch.testing.assert_close(found[0], scale, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found[1], offset, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_refit_lowers_gptqs_objective(grid: Grid, seed: int) -> None:
    x, weight = inputs(seed), drawn(100 + seed, 40, COLUMNS)
    hessian = x.t() @ x
    coded = code_gptq(weight, inverse_factor(hessian, 0.01), grid)
    scale, offset = refit(grid, weight, coded.codes, coded.scale, coded.offset, hessian)
    before = objective(weight, coded.rounded(grid).weight, hessian)
    after = objective(weight, Coded(coded.codes, scale, offset, coded.steps).rounded(grid).weight, hessian)
    assert after < 0.95 * before


@pytest.mark.parametrize("kind", [MBQ3_64, MBQ3S_64], ids=lambda kind: kind.name)
def test_refit_bears_rows_and_inputs_that_say_nothing(kind: QuantType) -> None:
    line = grid_for(kind)
    weight = drawn(21, 6, COLUMNS)
    weight[0], weight[1, :64], weight[2] = 0.0, 1e-9, 3.0
    x = drawn(22, 20, COLUMNS)  # fewer tokens than columns
    x[:, :32], x[:, 32:96] = 0.0, x[:, 32:33]  # dead channels, and some that are one
    found = Moments(1e6 * x.t() @ x)
    coded = refined(weight, found, line, Refinement(0.01, clip=True, error_correction=0.0, refits=3))
    assert coded.values(line).isfinite().all()
    plain = refined(weight, found, line, Refinement(0.01, clip=True, error_correction=0.0, refits=0))
    assert objective(weight, coded.values(line), found.hessian) <= objective(weight, plain.values(line), found.hessian)


def test_the_corrected_weight_gives_the_original_output() -> None:
    y = inputs(5)
    x = y + 0.2 * drawn(9, *y.shape)  # what an already rounded prefix gives
    weight = drawn(7, 10, COLUMNS)
    found = Moments(x.t() @ x, (y - x).t() @ x)
    whole = corrected(weight, found, inverse_factor(found.hessian, 1e-6), 1.0)
    best = torch.linalg.lstsq(x.double(), (y @ weight.t()).double()).solution.t().float()
    torch.testing.assert_close(whole, best, rtol=1e-2, atol=1e-2)

    def miss(candidate: torch.Tensor) -> float:
        return float((y @ weight.t() - x @ candidate.t()).norm())

    half = corrected(weight, found, inverse_factor(found.hessian, 1e-6), 0.5)
    assert miss(whole) < miss(half) < miss(weight)


def test_the_original_output_stands_for_the_original_input() -> None:
    """(W y)^T x less W H is W (y - x)^T x, also of some rows of W."""
    y, weight = inputs(5), drawn(7, 10, COLUMNS)
    x = y + 0.2 * drawn(9, *y.shape)
    by_inputs = Moments(x.t() @ x, (y - x).t() @ x)
    by_outputs = Moments(by_inputs.hessian, written=(y @ weight.t()).t() @ x)
    factor = inverse_factor(by_inputs.hessian, 0.01)
    whole = corrected(weight, by_inputs, factor, 0.5)
    for rows in (slice(0, 10), slice(3, 8)):
        miss = corrected(weight[rows], by_outputs.of_rows(rows), factor, 0.5) - whole[rows]
        assert float(miss.norm() / (whole - weight)[rows].norm()) < OF_THE_CHANGE


def test_zeros_of_the_factor_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns, and a correction's, in parts that do not divide them."""
    x, other, weight = inputs(5), inputs(6), drawn(7, 10, COLUMNS)
    found = Moments(x.t() @ x, other.t() @ x)
    factor = inverse_factor(found.hessian, 0.01)
    whole = corrected(weight, found, factor, 0.5)
    for at_once in (inverse.COLUMNS_SOLVED, sequence.COLUMNS_CORRECTED):
        monkeypatch.setitem(at_once, "cpu", 48)
    assert COLUMNS % 48
    torch.testing.assert_close(inverse_factor(found.hessian, 0.01), factor, rtol=1e-6, atol=0)  # float64 rounded to float32
    miss = corrected(weight, found, factor, 0.5) - whole
    assert float(miss.norm() / (whole - weight).norm()) < SUMS_OF_THE_CHANGE


def test_everything_together_beats_plain_gptq(grid: Grid) -> None:
    x, weight = inputs(11), drawn(12, 64, COLUMNS)
    found = Moments(x.t() @ x, torch.zeros(COLUMNS, COLUMNS))
    plain = refined(weight, found, grid, Refinement(0.01, clip=False, error_correction=0.0, refits=0)).rounded(grid)
    better = refined(weight, found, grid, Refinement(0.01, clip=True, error_correction=0.5, refits=2)).rounded(grid)
    assert objective(weight, better.weight, found.hessian) < 0.9 * objective(weight, plain.weight, found.hessian)


def test_matrices_with_one_input_are_rounded_as_if_each_were_alone(grid: Grid) -> None:
    x, weight = inputs(13), drawn(14, 60, COLUMNS)
    found = Moments(x.t() @ x, 0.1 * drawn(15, COLUMNS, COLUMNS))
    how = Refinement(0.01, clip=True, error_correction=0.5, refits=2)
    together = refined(weight, found, grid, how).split([24, 36])
    for part, alone in zip(together, (refined(rows, found, grid, how) for rows in (weight[:24], weight[24:])), strict=True):
        same = (part.codes == alone.codes).float().mean()
        assert same > 0.99  # products of other shapes add up in another order, and a tie may fall the other way
        assert part.steps.shape == alone.steps.shape


def test_small_groups_lose_less_at_the_same_size(grid: Grid) -> None:
    assert MBQ3S_64.type_size == MBQ3_64.type_size
    small = grid_for(MBQ3S_64)
    x, weight = inputs(16), drawn(17, 64, COLUMNS)
    found = Moments(x.t() @ x)
    how = Refinement(0.01, clip=True, error_correction=0.0, refits=2)
    lost = [objective(weight, refined(weight, found, kind, how).rounded(kind).weight, found.hessian) for kind in (small, grid)]
    assert lost[0] < 0.9 * lost[1]  # measured 0.85; on two layers of the reference VLM 0.74 to 0.81


def test_refits_give_what_scale_words_can_hold() -> None:
    small = grid_for(MBQ3S_64)
    x, weight = inputs(18), drawn(19, 20, COLUMNS)
    coded = refined(weight, Moments(x.t() @ x), small, Refinement(0.01, clip=True, error_correction=0.0, refits=2))
    held = small.held(coded.scale, coded.offset)
    assert held[0].equal(coded.scale)
    assert held[1].equal(coded.offset)
    assert (MBQ3S_64.dequantize(coded.rounded(small).data) == coded.values(small).numpy()).all()


@pytest.mark.parametrize("seed", range(3))
def test_descent_lowers_gptqs_objective_and_ends(grid: Grid, seed: int) -> None:
    x, weight = inputs(20 + seed), drawn(120 + seed, 40, COLUMNS)
    hessian = x.t() @ x
    coded = code_gptq(weight, inverse_factor(hessian, 0.01), grid, partial(search_range, grid))
    exact = damped(hessian, 0.01).float()
    losses = [objective(weight, coded.values(grid), exact)]
    for _ in range(12):
        coded = descend(grid, weight, coded, hessian, 0.01)
        losses.append(objective(weight, coded.values(grid), exact))
    assert losses[1] < 0.97 * losses[0]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))  # float32 sums
    assert coded.codes.min() >= grid.low
    assert coded.codes.max() <= grid.high


def test_descent_by_hand(grid: Grid) -> None:
    # Two columns that move together: after column 0 is rounded down, the best code of column 1 is one up.
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([2.4, 2.4])
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 0.9
    start = Coded(torch.zeros(1, 64), torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 2))
    found = descend(grid, weight, start, hessian, 0.0)
    # Column 0 first stands for both: 2.4 + 0.9 * 2.4 = 4.56, code 5. Then column 1: 2.4 + 0.9 * (2.4 - 5) = 0.06, code 0.
    assert found.codes[0, :3].tolist() == [5.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["W4A8", "W8A8"])
def test_a_rows_refitted_scale_is_the_least_squares_one(kind: str) -> None:
    grid = grid_for(quant_type_for(kind, COLUMNS))
    weight, x = drawn(40, 24, COLUMNS), inputs(41)
    coded = code_gptq(weight, inverse_factor(x.t() @ x, 0.01), grid, partial(search_range, grid))
    found = refit_row_scale(weight, coded.codes, coded.scale, x.t() @ x)
    assert torch.equal(found, found.half().float())
    errors = []
    for row in range(len(weight)):
        made, wanted = (x.double() @ coded.codes[row].double()), x.double() @ weight[row].double()
        best = float(made @ wanted / (made @ made))
        assert float(found[row]) == pytest.approx(best, rel=2**-10)  # fp16, or what it had where that is no worse
        errors.append([float((made * float(scale[row]) - wanted).square().sum()) for scale in (found, coded.scale)])
    assert all(after <= before * (1 + 1e-5) for after, before in errors)  # float32 tells steps of less than that by chance
    if kind == "W4A8":
        assert sum(after for after, _ in errors) < 0.99 * sum(before for _, before in errors)


def test_refits_lower_the_objective_of_one_scale_a_row() -> None:
    grid = grid_for(quant_type_for("W4A8", COLUMNS))
    weight, x = drawn(50, 24, COLUMNS), inputs(51)
    hessian = x.t() @ x
    found = [refined(weight, Moments(hessian), grid, Refinement(0.01, True, 0.0, refits)).values(grid) for refits in (0, 1, 2)]
    first, second, third = (objective(weight, values, hessian) for values in found)
    assert third < second < first


def test_a_dead_row_keeps_its_scale() -> None:
    scale = torch.tensor([[0.5], [0.0]])
    assert torch.equal(refit_row_scale(torch.ones(2, 4), torch.zeros(2, 4), scale, torch.eye(4)), scale)
