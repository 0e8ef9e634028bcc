"""A passage through a layer that is being rounded gives what whole runs of the layer would, and runs each part once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration import moments, packs
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import BRANCHES, Passage
from mbq_gguf.calibration.stream import Streamed, advance, capture, run_layer, working_layer
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.decoder import GROUPS, LINEARS, Group, linear
from torch import nn

ROUNDING = 1e-5  # of the largest entry: sums over 1,000 tokens in float32 against float64


@pytest.fixture
def streams(tiny: LoadedModel, samples: list[Sample]) -> list[Streamed]:
    return list(capture(tiny, samples[:3]))


@pytest.fixture
def layer(tiny: LoadedModel) -> nn.Module:
    """Layer 0 with a transform before down_proj, as a rotation leaves it."""
    layer = working_layer(tiny, 0)
    linear(layer, "mlp.down_proj").register_forward_pre_hook(lambda _module, args: (2 * args[0].flip(-1),))
    return layer


def round_coarsely(layer: nn.Module, group: Group) -> None:
    for name in group.linears:
        weight = linear(layer, name).weight
        weight.data.copy_((weight * 16).round() / 16)


@torch.no_grad()
def whole_runs(layer: nn.Module, streams: list[Streamed], group: Group) -> list[torch.Tensor]:
    """The inputs of ``group`` [tokens, columns], float64, from whole runs of the layer."""
    seen: list[torch.Tensor] = []
    handle = linear(layer, group.linears[0]).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0].double()))
    for stream in streams:
        run_layer(layer, stream.hidden, stream.kwargs[0])
    handle.remove()
    return seen


@pytest.mark.parametrize("tile", [40, moments.TILE])
def test_moments_equal_those_of_whole_runs(layer: nn.Module, streams: list[Streamed], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "TILE", tile)
    passage = Passage(layer, 0, [replace(stream) for stream in streams])
    for group in GROUPS:
        inputs = whole_runs(layer, streams, group)
        originals = [x.float() + torch.randn_like(x, dtype=torch.float32) for x in inputs]
        found = passage.moments(group, uniform, originals)
        x, y = torch.cat(inputs), torch.cat(originals).double()
        for ours, exact in ((found.hessian, x.t() @ x), (found.cross, (y - x).t() @ x)):
            assert ours is not None
            assert float((ours - exact).abs().max() / exact.abs().max()) < ROUNDING
        round_coarsely(layer, group)
    passage.advance()
    advance(layer, 0, streams)
    assert all(torch.equal(ours.hidden, plain.hidden) for ours, plain in zip(passage.streams, streams, strict=True))


def test_attention_and_wide_linears_run_once_a_pack(layer: nn.Module, streams: list[Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "TOKENS", len(streams[0].ids) + len(streams[1].ids))
    runs: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: runs.update([name])

    for name in LINEARS:
        linear(layer, name).register_forward_hook(counter(name))
    passage = Passage(layer, 0, streams)
    for group in GROUPS:
        passage.moments(group, uniform)
    passage.advance()
    once = [name for name in LINEARS if name not in BRANCHES]
    assert [runs[name] for name in once] == [2] * len(once)  # three streams, the last one alone


def test_groups_that_nobody_asks_for_are_run_all_the_same(layer: nn.Module, streams: list[Streamed]) -> None:
    (exact,) = whole_runs(layer, streams[:1], GROUPS[2])
    found = Passage(layer, 0, streams[:1]).moments(GROUPS[2], uniform)
    assert float((found.hessian - exact.t() @ exact).abs().max() / found.hessian.abs().max()) < ROUNDING


def test_the_layer_is_whole_again_after_an_interruption(layer: nn.Module, streams: list[Streamed]) -> None:
    branches = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    passage = Passage(layer, 0, streams)
    passage.moments(GROUPS[1], uniform)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    branches[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        passage.moments(GROUPS[2], uniform)
    assert (layer.get_submodule("self_attn"), layer.get_submodule("mlp")) == branches


def test_after_a_restart_changed_weights_count(layer: nn.Module, streams: list[Streamed]) -> None:
    passage = Passage(layer, 0, [replace(stream) for stream in streams])
    passage.moments(GROUPS[1], uniform)
    round_coarsely(layer, GROUPS[0])
    passage.restart()
    passage.advance()
    advance(layer, 0, streams)
    assert all(torch.equal(ours.hidden, plain.hidden) for ours, plain in zip(passage.streams, streams, strict=True))
