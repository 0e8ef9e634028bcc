"""Hadamard matrices of the widths in use."""

from __future__ import annotations

from math import prod

import pytest
import torch
from mbq_gguf.errors import UserError
from mbq_gguf.transforms.hadamard import block_size, factors, hadamard, random_rotation

# Hidden and feed-forward widths of SmolVLM, Qwen2-VL 2B to 72B, InternVL2 and the reference VLM.
WIDTHS = (576, 960, 1536, 2560, 3584, 4096, 8192, 8960, 14336, 18944, 29568)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_in_use_has_factors(width: int) -> None:
    orders = factors(width)
    assert orders is not None
    assert prod(orders) == width


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 76, 140, 148, 576, 924, 960, 1536])
def test_matrices_are_orthogonal_with_equal_entries(order: int) -> None:
    matrix = hadamard(order)
    bound = 1e-13 * order  # float64 sums of `order` products
    assert float((matrix @ matrix.t() - torch.eye(order, dtype=torch.float64)).abs().max()) < bound
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_powers_of_two_are_sylvesters() -> None:
    # ggml's fast transform: entry (i, j) is negative where i and j share an odd number of bits.
    signs = torch.tensor([[1 - 2 * ((i & j).bit_count() % 2) for j in range(64)] for i in range(64)], dtype=torch.float64)
    torch.testing.assert_close(hadamard(64), signs / 8)


def test_an_order_without_a_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="order 6:"):
        hadamard(6)


def test_the_seed_decides_the_rotation() -> None:
    first, again, other = (random_rotation(12, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_block_sizes_of_the_online_transform() -> None:
    assert [block_size(n) for n in (1536, 8960, 18944, 29568, 14336)] == [512, 256, 512, 128, 512]
