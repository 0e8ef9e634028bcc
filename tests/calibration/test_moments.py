"""Replaying a layer during rounding gives the same as whole runs of the layer, and runs each part once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration import batches, sums
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import Replay
from mbq_gguf.calibration.stream import advance, capture, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.threads import torch_threads

ROUNDING = 1e-5  # of the largest entry: sums over 1,000 tokens in float32 against float64


@pytest.fixture
def streams(tiny: LoadedModel, samples: list[Sample]) -> list[Streamed]:
    return list(capture(tiny, samples[:3]))


@pytest.fixture
def layer(tiny: LoadedModel) -> Layer:
    """Layer 0 with a transform before down_proj, as a rotation leaves it."""
    layer = working_layer(tiny, 0)
    layer.linear("mlp.down_proj").register_forward_pre_hook(lambda _module, args: (2 * args[0].flip(-1),))
    return layer


def round_coarsely(layer: Layer, site: Site) -> None:
    for name in site.readers:
        weight = layer.linear(name).weight
        weight.detach().copy_((weight * 16).round() / 16)  # as rounding does; behind ``data`` it would not count as a change


@torch.no_grad()
def whole_runs(layer: Layer, streams: list[Streamed], site: Site) -> list[torch.Tensor]:
    """The inputs of ``site`` [tokens, columns], float64, from whole runs of the layer."""
    seen: list[torch.Tensor] = []
    handle = layer.linear(site.readers[0]).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0].double()))
    for stream in streams:
        layer.run(stream.hidden, stream.kwargs[0])
    handle.remove()
    return seen


@pytest.mark.parametrize("tile", [40, sums.TILE])
def test_moments_equal_those_of_whole_runs(layer: Layer, streams: list[Streamed], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "TILE", tile)
    replay = Replay(layer, [replace(stream) for stream in streams])
    for site in STANDARD.sites:
        inputs = whole_runs(layer, streams, site)
        originals = [x.float() + torch.randn_like(x, dtype=torch.float32) for x in inputs]
        writer, x, y = layer.narrow_writer(site), torch.cat(inputs), torch.cat(originals).double()
        if writer:
            outputs = [original @ writer.weight.t() for original in originals]
            found = replay.moments(site, uniform, outputs)
            crossed, exact_crossed = found.written, torch.cat(outputs).double().t() @ x
        else:
            found = replay.moments(site, uniform, originals)
            crossed, exact_crossed = found.cross, (y - x).t() @ x
        for ours, exact in ((found.hessian, x.t() @ x), (crossed, exact_crossed)):
            assert ours is not None
            assert float((ours - exact).abs().max() / exact.abs().max()) < ROUNDING
        round_coarsely(layer, site)
    replay.advance()
    advance(layer, streams)
    assert all(torch.equal(ours.hidden, plain.hidden) for ours, plain in zip(replay.streams, streams, strict=True))


def test_workers_give_the_bits_of_one(layer: Layer, streams: list[Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one sample each, of which the last has no other beside it, and tiles that leave a rest."""
    monkeypatch.setattr(batches, "TOKENS", 1)
    monkeypatch.setattr(sums, "TILE", 40)
    found: list[list[torch.Tensor]] = []
    for workers in (1, 2):
        own = layer.copy()
        tensors, replay = [], Replay(own, [replace(stream) for stream in streams], workers)
        assert len(replay.batches) == 3
        with torch_threads(workers):
            for site in own.sites:
                moments = replay.moments(site, uniform, of_original(own, streams, site))
                tensors += [part for part in (moments.hessian, moments.cross, moments.written) if part is not None]
                round_coarsely(own, site)
            replay.advance()
        found.append(tensors + [stream.hidden for stream in replay.streams])
    assert len(found[0]) == 2 * len(layer.sites) + 3
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def of_original(layer: Layer, streams: list[Streamed], site: Site) -> list[torch.Tensor]:
    """What stands for the original's activations of ``site``: inputs, or outputs where they are fewer."""
    inputs, writer = [x.float() for x in whole_runs(layer, streams, site)], layer.narrow_writer(site)
    return [x @ writer.weight.t() for x in inputs] if writer else inputs


def test_every_linear_runs_once_a_batch_and_norms_twice(layer: Layer, streams: list[Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKENS", len(streams[0].ids) + len(streams[1].ids))
    runs: Counter[str] = Counter()

    def counted(name: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (runs.update([name]), forward(x))[1]

    for name in STANDARD.readers:
        monkeypatch.setattr(layer.linear(name), "forward", counted(name, layer.linear(name).forward))
    for name in STANDARD.norms:
        monkeypatch.setattr(layer.part(name), "forward", counted(name, layer.part(name).forward))
    replay = Replay(layer, streams)
    for site in STANDARD.sites:
        replay.moments(site, uniform)
    replay.advance()
    # three streams, the last one alone; a norm for either site of its branch
    assert runs == dict.fromkeys(STANDARD.readers, 2) | dict.fromkeys(STANDARD.norms, 4)


def test_groups_that_nobody_asks_for_are_run_all_the_same(layer: Layer, streams: list[Streamed]) -> None:
    (exact,) = whole_runs(layer, streams[:1], STANDARD.sites[2])
    found = Replay(layer, streams[:1]).moments(STANDARD.sites[2], uniform)
    assert float((found.hessian - exact.t() @ exact).abs().max() / found.hessian.abs().max()) < ROUNDING


def test_the_layer_is_whole_again_after_an_interruption(layer: Layer, streams: list[Streamed]) -> None:
    branches = layer.part("self_attn"), layer.part("mlp")
    replay = Replay(layer, streams)
    replay.moments(STANDARD.sites[1], uniform)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    branches[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay.moments(STANDARD.sites[2], uniform)
    assert (layer.part("self_attn"), layer.part("mlp")) == branches


@pytest.mark.parametrize("place", [0, 1, 2], ids=lambda place: STANDARD.sites[place].name)
def test_weights_that_change_too_late_are_noticed(layer: Layer, streams: list[Streamed], place: int) -> None:
    """What was kept before down_proj came from all that lies before it."""
    replay = Replay(layer, [replace(stream) for stream in streams])
    for site in STANDARD.sites:
        replay.moments(site, uniform)
    round_coarsely(layer, STANDARD.sites[3])  # as it should be
    replay._check_kept()
    round_coarsely(layer, STANDARD.sites[place])
    for late in (replay.advance, lambda: replay.moments(STANDARD.sites[3], uniform)):
        with pytest.raises(RuntimeError, match=r"weights have changed since (self_attn\.o|mlp\.down)_proj was reached"):
            late()
    fresh = Replay(layer, replay.streams)
    fresh.advance()
    advance(layer, streams)
    assert all(torch.equal(ours.hidden, plain.hidden) for ours, plain in zip(fresh.streams, streams, strict=True))
