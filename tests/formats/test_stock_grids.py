"""What a stock type's grid packs is what ggml reads: equal, not just close."""

from __future__ import annotations

import pytest
import torch
from grids import grid_for
from hypothesis import given, settings
from hypothesis import strategies as st
from mbq_cbind import types
from mbq_gguf.formats.grid import Parameter
from mbq_gguf.formats.registry import quant_type

STOCK = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ROWS, COLUMNS = 3, 512


def drawn(parameter: Parameter, step: torch.Tensor, groups: int, draw: torch.Generator) -> torch.Tensor:
    """Values [rows, groups] that the file can hold, over all of the parameter's range."""
    if parameter.low is None or parameter.high is None:
        return torch.randn(ROWS, groups, generator=draw).half().float()
    multiples = torch.randint(parameter.low, parameter.high + 1, (ROWS, groups), generator=draw)
    return multiples * step.repeat_interleave(groups // step.shape[1], 1)


@pytest.mark.parametrize("name", STOCK)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 500.0]))
@settings(max_examples=25)
def test_ggml_reads_what_was_packed(name: str, seed: int, size: float) -> None:
    grid, draw = grid_for(quant_type(name)), torch.Generator().manual_seed(seed)
    steps = (size * torch.randn(ROWS, COLUMNS // grid.block, 2, generator=draw)).half().float()
    scale = drawn(grid.scale, steps[..., 0], COLUMNS // grid.group, draw)
    offset = drawn(grid.offset, steps[..., 1], COLUMNS // grid.group, draw)
    codes = torch.randint(grid.low, grid.high + 1, (ROWS, COLUMNS), generator=draw).float()
    data = grid.packed(codes, scale, offset, steps)
    values = codes * scale.repeat_interleave(grid.group, 1) + offset.repeat_interleave(grid.group, 1)
    assert torch.equal(torch.from_numpy(types.dequantize(name, data.numpy(), COLUMNS)), values)


@pytest.mark.parametrize("name", STOCK)
def test_every_code_counts(name: str) -> None:
    # The property above would not notice a code range that is too small.
    grid = grid_for(quant_type(name))
    levels = {"Q2": 4, "Q3": 8, "Q4": 16, "Q5": 32, "Q6": 64, "Q8": 256}[name[:2]]
    assert grid.high - grid.low + 1 == levels
    assert grid.block == quant_type(name).block_size


def test_a_step_gives_the_largest_value_the_largest_multiple() -> None:
    both, up = Parameter(-32, 31), Parameter(0, 63)
    values = torch.tensor([[1.0, -4.0, 2.0], [1.0, 8.0, 0.0], [0.0, 0.0, 0.0]])
    assert both.step(values).tolist() == [0.125, -0.25, 0.0]
    assert up.step(torch.tensor([[0.0, 63 / 8]])).tolist() == [0.125]
    assert Parameter().step(values).tolist() == Parameter(0, 0).step(values).tolist() == [0.0, 0.0, 0.0]


def test_parameters_take_the_nearest_value_that_the_file_holds() -> None:
    values = torch.tensor([0.26, -9.0, 9.0])
    step = torch.tensor(0.25)
    assert Parameter(-32, 31).nearest(values, step).tolist() == [0.25, -8.0, 7.75]
    assert Parameter(-32, 31).nearest(values, torch.tensor(0.0)).tolist() == [0.0, 0.0, 0.0]
    assert Parameter(0, 63).nearest(values, step).tolist() == [0.25, 0.0, 9.0]
    assert Parameter(0, 63).nearest(values, None).tolist() == [values[0], 0.0, 9.0]
    assert Parameter(0, 0).nearest(values, step).tolist() == [0.0, 0.0, 0.0]
    assert Parameter().nearest(torch.tensor([1e6, 0.1]), None).tolist() == [65504.0, float(torch.tensor(0.1).half())]
