"""Attention over concatenated samples equals that of each sample alone, for every way of grouping them."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration.apart import Apart, by_neighbours, padded
from torch.nn.functional import scaled_dot_product_attention

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # sums over as many keys in another order
CHANNELS = 8


@pytest.mark.parametrize("together", [padded, by_neighbours])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(5, 9, 9, 1), (1, 1, 1), (40, 3, 3, 40, 17), (16, 17), (7,)])
def test_each_sample_by_itself(together: object, key_heads: int, lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), CHANNELS, generator=draw) for heads in (4, key_heads, key_heads))
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": key_heads < 4}
    alone = [
        scaled_dot_product_attention(*parts, **options)  # type: ignore[arg-type]
        for parts in zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    assert callable(together)
    torch.testing.assert_close(together(lengths, query, key, value, **options), torch.cat(alone, dim=2), **FLOAT32)


def test_a_mode_gives_a_model_both() -> None:
    query = torch.randn(1, 2, 6, CHANNELS, generator=torch.Generator().manual_seed(0))
    with Apart((2, 4)):
        found = scaled_dot_product_attention(query, query, query, is_causal=True)
    assert found.equal(by_neighbours((2, 4), query, query, query, is_causal=True))
    assert not found.allclose(scaled_dot_product_attention(query, query, query, is_causal=True))
