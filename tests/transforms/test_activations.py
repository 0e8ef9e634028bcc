"""int8 activations against docs/format.md's formula in NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mbq_gguf.transforms.activations import int8_inputs, int8_tokens
from torch import nn

FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(arrays(np.float32, (3, 8), elements=FINITE))
def test_equals_the_formula(x: np.ndarray) -> None:
    amax = np.abs(x).max(axis=1, keepdims=True)
    amax[amax < np.float32(2.0**-95)] = 0
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    wanted = np.rint(x * inverse) * (amax / np.float32(127))
    assert np.array_equal(int8_tokens(torch.from_numpy(x)).numpy(), wanted)


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert int8_tokens(x).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_what_the_kernels_take_for_zero_is_zero() -> None:
    assert not int8_tokens(torch.full((1, 4), 2.0**-96)).any()
    assert int8_tokens(torch.full((1, 4), 2.0**-95)).any()


def test_inputs_are_int8_only_while_it_lasts() -> None:
    module, factors = nn.Linear(8, 4, bias=False), torch.linspace(0.5, 2, 8)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    before = module(x)
    with int8_inputs([module, module], factors):  # a module twice is hooked once: int8 of int8 over the factors would differ
        assert torch.equal(module(x), module.forward(int8_tokens(x / factors)))
    assert torch.equal(module(x), before)
