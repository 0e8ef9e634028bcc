"""Which tokens each expert sees: found for all experts at once, compared with looking at one after the other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.models.experts import Experts, _routes
from torch import nn


@given(
    tokens=st.integers(1, 40),
    shares=st.lists(st.one_of(st.just(0.0), st.floats(0.0, 1.0)), min_size=2, max_size=9),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_routes(tokens: int, shares: list[float], seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(shares)))
    chosen = torch.rand(tokens, len(shares), generator=torch.Generator().manual_seed(seed)).topk(k, dim=1).indices
    for number, (share, route) in enumerate(zip(shares, _routes(chosen, shares), strict=True)):
        own = [token for token in range(tokens) if number in chosen[token]]
        rest = [token for token in range(tokens) if token not in own]
        assert route.tokens.tolist() == own
        assert route.places.tolist() == [chosen[token].tolist().index(number) for token in own]
        taken = [token for step, token in enumerate(rest) if math.floor(step * share) > math.floor(step * share - share)]
        assert route.others.tolist() == taken
        assert (route.own, route.more) == (len(own), len(taken))


def test_counting_runs_no_expert() -> None:
    torch.manual_seed(0)
    experts = Experts(SimpleNamespace(gate_up_proj=torch.randn(4, 12, 8), down_proj=torch.randn(4, 8, 6), act_fn=nn.SiLU()))
    hidden, chosen = torch.randn(10, 8), torch.rand(10, 4).topk(2, dim=1).indices
    whole = experts(hidden, chosen, torch.rand(10, 2))
    reached, rows = experts.reached, {number: len(own) for number, own in experts.rows.items()}
    experts.counts_only = True
    assert whole.abs().sum() > 0
    assert experts(hidden, chosen, torch.rand(10, 2)).abs().sum() == 0
    assert experts.reached == reached == [rows.get(number, 0) for number in range(4)]
    assert experts.rows == {}
