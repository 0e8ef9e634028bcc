"""Predicted costs against the quantities that they estimate, and the plan based on them."""

from __future__ import annotations

from functools import partial
from io import StringIO

import pytest
import torch
from grids import grid_for
from mbq_gguf.allocation import predict
from mbq_gguf.allocation.knapsack import Option
from mbq_gguf.allocation.plan import make_plan, plan_table
from mbq_gguf.allocation.predict import Inputs, candidates, layer_options, output_scale, predict_objective
from mbq_gguf.calibration.stream import working_layer
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.rounding.gptq import objective, round_gptq
from mbq_gguf.rounding.inverse import inverse_factor
from mbq_gguf.rounding.nearest import round_nearest
from mbq_gguf.rounding.ranges import search_range
from rich.console import Console

DAMPING = 0.01


def inputs_of(layer: Layer, seed: int) -> dict[str, Inputs]:
    """Second moments of inputs that share a few directions, for every site."""
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for site in STANDARD.sites:
        columns = layer.linear(site.readers[0]).in_features
        x = torch.randn(500, 16, generator=draw) @ torch.randn(16, columns, generator=draw) + torch.randn(500, columns, generator=draw)
        out[site.name] = Inputs(x.t() @ x, 500.0)
    return out


def test_cost_by_hand() -> None:
    # tr(dW H dW^T) = (1, 2) H (1, 2)^T + (0, 1) H (0, 1)^T = 2 + 4 * 1 + 4 * 3 + 3 = 21.
    inputs = Inputs(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), weight=7.0)
    assert inputs.cost(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), fisher=0.5) == pytest.approx(0.5 * 21 / 7)


def test_candidates_follow_the_row_length() -> None:
    assert [kind.name for kind in candidates(256)][:4] == ["Q2_K", "MBQ3S", "Q3_K", "MBQ3S_64"]
    assert [kind.name for kind in candidates(192)] == ["MBQ3S_64", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert [kind.name for kind in candidates(30)] == ["F16"]


def test_sizes_and_nearest_costs_are_the_types(tiny: LoadedModel) -> None:
    layer = working_layer(tiny, 0)
    inputs = inputs_of(layer, 0)
    options = layer_options(layer, inputs, dict.fromkeys(STANDARD.readers, 2.0), None, False)
    weight = layer.linear("self_attn.k_proj").weight.detach()
    rounded = round_nearest(weight, quant_type("Q4_1"))
    assert options["self_attn.k_proj"]["Q4_1"].size == rounded.data.size
    assert options["self_attn.k_proj"]["Q4_1"].loss == pytest.approx(2 * objective(weight, rounded.weight, inputs["qkv"].hessian) / 500)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["MBQ3S", "MBQ3S_64", "Q2_K", "Q3_K", "Q4_1", "Q5_0", "Q6_K"])
def test_gptqs_cost_is_foreseen_without_running_it(kind: str, clip: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(900, 32, generator=draw) @ torch.randn(32, 256, generator=draw) + torch.randn(900, 256, generator=draw)
    weight, hessian = torch.randn(96, 256, generator=draw), x.t() @ x
    grid = grid_for(quant_type(kind))
    factor = inverse_factor(hessian, DAMPING)
    actual = objective(weight, round_gptq(weight, factor, grid, partial(search_range, grid) if clip else None).weight, hessian)
    assert predict_objective(weight, factor.diagonal().square().reciprocal(), grid, clip) == pytest.approx(actual, rel=0.25)
    assert objective(weight, round_nearest(weight, quant_type(kind)).weight, hessian) > 2 * actual  # what it is to be told apart from


def test_options_are_scaled_up_from_some_rows(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = working_layer(tiny, 1)
    few = layer_options(layer, inputs_of(layer, 1), dict.fromkeys(STANDARD.readers, 1.0), DAMPING, False)
    monkeypatch.setattr(predict, "ROWS", 10**6)
    every = layer_options(layer, inputs_of(layer, 1), dict.fromkeys(STANDARD.readers, 1.0), DAMPING, False)
    for kind, option in every["mlp.gate_proj"].items():  # 192 rows
        assert few["mlp.gate_proj"][kind].size == option.size
        assert few["mlp.gate_proj"][kind].loss == pytest.approx(option.loss, rel=0.1)


def test_output_scale_is_the_following_sites(tiny: LoadedModel) -> None:
    layer = working_layer(tiny, 0)
    factors = {"qkv": torch.ones(1), "o": torch.full((2,), 2.0), "down": torch.full((3,), 3.0)}
    for name, expected in {"self_attn.v_proj": factors["o"], "mlp.up_proj": factors["down"]}.items():
        assert torch.equal(output_scale(layer, factors, name), expected)  # type: ignore[arg-type]
    assert output_scale(layer, factors, "self_attn.q_proj") is None
    assert output_scale(layer, {}, "mlp.up_proj") is None


OPTIONS = {
    "layers.0.mlp.up_proj.weight": {"MBQ3": Option(32, 1.0), "Q8_0": Option(96, 0.0)},
    "layers.1.mlp.up_proj.weight": {"MBQ3": Option(32, 3.0), "Q8_0": Option(96, 0.25)},
}
WEIGHTS = dict.fromkeys(OPTIONS, 64)


def test_plan_spends_where_it_pays() -> None:
    plan = make_plan(OPTIONS, WEIGHTS, 8.0)  # 128 bytes for 128 weights: one of the two can have Q8_0
    assert list(plan.type_names.values()) == ["MBQ3", "Q8_0"]
    assert plan.bits_per_weight == 8.0
    assert plan.predicted == 1.25


def test_plan_that_cannot_be_met() -> None:
    with pytest.raises(UsageError, match=r"take 4\.000 bits per weight: give a larger --target-bpw"):
        make_plan(OPTIONS, WEIGHTS, 3.9)


def test_table_sums_by_kind_of_tensor() -> None:
    console = Console(width=120, file=StringIO())
    console.print(plan_table(make_plan(OPTIONS, WEIGHTS, 8.0), dict.fromkeys(OPTIONS, 0.75)))
    rows = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["mlp.up_proj", "1", "MBQ3,", "1", "Q8_0", "8.000", "1.25", "1.5"] in rows
