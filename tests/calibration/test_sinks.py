"""Attention sinks are found where they were planted, by position or id."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.ranges import count_magnitudes
from mbq_gguf.calibration.sinks import Sinks, find_sinks, name_sinks
from mbq_gguf.calibration.stream import capture, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models import LoadedModel


@pytest.fixture(scope="module")
def streams(tiny: LoadedModel, samples: list[Sample]) -> list[Streamed]:
    return list(capture(tiny, samples[:3]))


def outliers(streams: list[Streamed], *, positions: tuple[int, ...] = (), tokens: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [Sinks(positions, tokens).of(stream) for stream in streams]


def test_a_tame_model_has_none(tiny: LoadedModel, streams: list[Streamed]) -> None:
    assert find_sinks(tiny, streams) == Sinks()


def test_a_planted_sink_is_found(tiny: LoadedModel, streams: list[Streamed]) -> None:
    """One channel of the second layer's down_proj answers to what the first token brings, and to little else: ridge regression says how."""
    loaded = replace(tiny, decoder=replace(tiny.decoder, layers=copy.deepcopy(tiny.decoder.layers)))
    loaded.hold()
    hidden, kwargs = working_layer(tiny, 0).run(streams[0].hidden, streams[0].kwargs[0]), streams[0].kwargs[1]
    layer = working_layer(tiny, 1)
    x = layer.input_of("mlp.gate_proj", lambda: layer.run(hidden, kwargs))[0].detach()
    first = torch.linalg.solve(x.t() @ x + x.square().mean() * torch.eye(x.shape[1]), x[0])
    mlp = loaded.decoder.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[0], mlp.up_proj.weight[0] = 20 * first / (first @ x[0]), 500 * first / (first @ x[0])
    assert find_sinks(loaded, streams).positions == (0,)


def test_positions_and_ids_are_told_apart(streams: list[Streamed]) -> None:
    token = int(streams[0].ids[-3])
    assert name_sinks(streams, outliers(streams, positions=(0, 1))) == Sinks((0, 1))
    assert name_sinks(streams, outliers(streams, tokens=(token,))).tokens == (token,)


def test_one_in_three_names_nothing(streams: list[Streamed]) -> None:
    none = [torch.zeros(len(stream.ids), dtype=torch.bool) for stream in streams]
    one = [outliers(streams, positions=(0,))[0], *none[1:]]
    assert name_sinks(streams, one) == name_sinks(streams, none) == Sinks()


def test_pictures_have_no_ids(streams: list[Streamed]) -> None:
    assert name_sinks(streams, [stream.vision for stream in streams]) == Sinks()
    picture = int(streams[0].ids[streams[0].vision][0])
    assert not Sinks(tokens=(picture,)).of(streams[0]).any()


def test_ranges_are_the_classes_own_largest(tiny: LoadedModel, streams: list[Streamed]) -> None:
    """Against whole runs of the layer; what a sink has is left out."""
    layer, sinks = working_layer(tiny, 0), Sinks((0,))
    counted = count_magnitudes(layer, [replace(stream) for stream in streams], sinks)
    for site in layer.sites:
        inputs = []
        for stream in streams:
            inputs.append(layer.input_of(site.readers[0], lambda stream=stream: layer.run(stream.hidden, stream.kwargs[0]))[0])  # type: ignore[misc]
        for kind in ("text", "vision"):
            masks = [stream.vision if kind == "vision" else ~stream.vision & ~sinks.of(stream) for stream in streams]
            largest = max(float(x[mask].abs().max()) for x, mask in zip(inputs, masks, strict=True))
            # batches are summed in another order
            assert counted[site.name, kind].range("minmax") == pytest.approx(largest, rel=1e-5)
