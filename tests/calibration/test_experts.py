"""Unstacked experts compute the same as transformers' stacked ones, and GPTQ does not ruin an expert that few tokens reach.

Costs two seconds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.experts import seeing_others, shares_of
from mbq_gguf.calibration.moments import Replay
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.formats.grid import to_f16
from mbq_gguf.formats.mbq3 import MBQ3_64
from mbq_gguf.models.experts import Experts, open_experts
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layouts import layout_of
from mbq_gguf.rounding.gptq import code_gptq
from mbq_gguf.rounding.learned import learn
from mbq_gguf.rounding.sequence import Refinement, round_in_order
from torch import nn
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

WIDTH, COUNT, STARVED, TOKENS = 128, 6, 0, 900
RARE = 300  # one in so many tokens is for the starved expert
REFINEMENT = Refinement(damping=0.01, clip=True, error_correction=0.0, refits=1)


class NoAttention(nn.Module):
    """Stands where attention is, so that rows of the residual stream are what the router sees."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def made_layer() -> nn.Module:
    """A layer of transformers' whose first expert few tokens choose: those with a large first channel."""
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": 256, "num_experts": COUNT, "num_experts_per_tok": 2}
    config = Qwen3VLMoeTextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    layer = Qwen3VLMoeTextDecoderLayer(config, 0)
    with torch.no_grad():
        for parameter in (*layer.mlp.experts.parameters(), layer.mlp.gate.weight):
            parameter.normal_(std=0.1)
        layer.mlp.gate.weight[STARVED] = 0
        layer.mlp.gate.weight[STARVED, 0] = 10
    layer.self_attn = NoAttention()
    return layer.requires_grad_(False).eval()


def tokens(count: int, seed: int) -> torch.Tensor:
    """Correlated activations [1, tokens, width], as those of models are; one in RARE is for the starved expert."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 24, generator=draw) @ torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(7))
    x += 0.7 * torch.randn(count, WIDTH, generator=draw)
    x[:, 0] = torch.where(torch.arange(count) % RARE == 0, 2.0, -2.0)
    return x[None]


def stream_of(x: torch.Tensor) -> Streamed:
    mask = torch.zeros(x.shape[1], dtype=torch.bool)
    return Streamed(x, [{}], torch.zeros(x.shape[1], dtype=torch.int64), mask, mask, mask)


@pytest.fixture
def layer() -> Layer:
    module = made_layer()
    open_experts(module, "mlp.experts")
    layout = replace(layout_of("Qwen3VLMoeForConditionalGeneration"), sites=())  # attention is none
    return Layer(module, 0, layout.of(module))


def test_opened_is_the_stack() -> None:
    module, x = made_layer(), tokens(50, 1)
    expected = module(x)
    open_experts(module, "mlp.experts")
    assert isinstance(module.mlp.experts, Experts)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    module.mlp.experts.shares = [0.5] * COUNT  # what others' tokens give goes nowhere
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    assert len(module.mlp.experts.rows[STARVED]) == 1 + (49 + 1) // 2  # and the first


def test_an_expert_that_is_given_weighed_tokens_is_the_stack_too() -> None:
    """Llama 4's: transformers gives each of its experts all tokens, times zero where it is not chosen; here it has its own alone."""
    config = Llama4TextConfig(hidden_size=WIDTH, intermediate_size=256, num_local_experts=COUNT, num_experts_per_tok=2)
    torch.manual_seed(0)
    holder = nn.Module()
    holder.feed_forward = Llama4TextMoe(config).requires_grad_(False)
    for parameter in holder.parameters():
        parameter.normal_(std=0.1)
    x = tokens(50, 1)
    expected, scores = holder.feed_forward(x)
    open_experts(holder, "feed_forward.experts")
    experts = holder.feed_forward.experts
    assert isinstance(experts, Experts)
    for shares in ([0.0] * COUNT, [0.5] * COUNT):  # what others' tokens give goes nowhere
        experts.shares = shares
        torch.testing.assert_close(holder.feed_forward(x)[0][0], expected, rtol=1e-5, atol=1e-5)
    chosen = scores.topk(2).indices
    for number in range(COUNT):
        own = (chosen == number).any(1).nonzero()[:, 0]
        assert experts.rows[number][: len(own)].tolist() == own.tolist()
        assert len(experts.rows[number]) == len(own) + (51 - len(own)) // 2
        assert (experts.weights[number] == 1).all()  # the router's weight is in what they are given


def test_shares_make_up_for_missing_tokens(layer: Layer) -> None:
    streams = [stream_of(tokens(TOKENS, seed)) for seed in (2, 3)]
    shares = shares_of(layer, streams)
    assert layer.experts is not None
    assert all(share == 0 for number, share in enumerate(shares) if number != STARVED)
    with seeing_others(layer, shares):
        seen = 0
        for stream in streams:
            layer.run(stream.hidden, {})
            seen += len(layer.experts.rows[STARVED])
    assert abs(seen - 4 * WIDTH) <= 2
    assert layer.experts.shares == [0.0] * COUNT


def error(layer: Layer, original: Layer, number: int, x: torch.Tensor) -> float:
    """The relative error of expert ``number`` on tokens that calibration has not seen."""
    assert layer.experts is not None
    assert original.experts is not None
    expected = original.experts[number](x)
    return float((layer.experts[number](x) - expected).norm() / expected.norm())


def test_a_starved_expert_is_not_ruined(layer: Layer) -> None:
    """With others' tokens it is as good as one that many reach; by its own 6 tokens alone it has 1.7 times the error."""
    names = {name: "MBQ3" for name in layer.layout.readers if f".{STARVED}." in name or f".{STARVED + 1}." in name}
    some = replace(layer, layout=replace(layer.layout, sites=tuple(site for site in layer.sites if site.expert in (STARVED, STARVED + 1))))
    streams = [stream_of(tokens(TOKENS, seed)) for seed in (2, 3)]
    unseen = tokens(100 * RARE, 9)[:, ::RARE], tokens(200, 10)
    errors = {}
    for others in (False, True):
        rounded = some.copy()
        replay = Replay(rounded, streams)
        with seeing_others(rounded, shares_of(rounded, streams) if others else []):
            round_in_order(rounded, names, lambda site, replay=replay: replay.moments(site, uniform), REFINEMENT)
        errors[others] = [error(rounded, layer, number, x) for number, x in zip((STARVED, STARVED + 1), unseen, strict=True)]
    print(errors)
    starved, reached = errors[True]
    assert starved <= 1.1 * reached
    assert errors[False][0] >= 1.5 * reached


def test_scales_of_an_expert_that_nothing_reaches_stay(layer: Layer) -> None:
    """While those of the others are learned, which were 5 % off."""
    inputs = [stream_of(tokens(60, seed)[:, 1:]) for seed in range(4)]
    targets = [layer.run(stream.hidden, {}) for stream in inputs]
    grid, coded = grid_for(MBQ3_64), {}
    for name in layer.layout.readers:
        weight = layer.linear(name).weight
        right = code_gptq(weight.detach(), torch.eye(weight.shape[1]), grid)
        coded[name] = (grid, replace(right, scale=to_f16(right.scale * 1.05)))
        weight.data.copy_(coded[name][1].values(grid))
    found = learn(layer, inputs, targets, uniform, coded, passes=20)
    assert found.keys() == coded.keys()
    same = {name for name, better in found.items() if torch.equal(better.scale, coded[name][1].scale)}
    assert same == {name for name in coded if f".{STARVED}." in name}
