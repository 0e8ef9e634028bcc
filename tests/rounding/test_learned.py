"""Learned scales: they correct a known error, can be stored in the file, and are refused if nothing follows the prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grids import grid_for
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import advance, capture, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.grid import Grid, to_f16
from mbq_gguf.formats.mbq3 import MBQ3_64
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.quantise import quantise
from mbq_gguf.rounding.gptq import Coded, code_gptq
from mbq_gguf.rounding.learned import Line, learn
from mbq_gguf.settings import QuantiseSettings

LEFT = 0.1  # of the squared error that scales off by 5 % make; measured 0.02


@pytest.fixture(scope="module")
def grid() -> Grid:
    return grid_for(MBQ3_64)


def miss(layer: Layer, inputs: list[Streamed], wanted: list[Streamed]) -> float:
    """Squared error of the layer's outputs."""
    given = [replace(stream) for stream in inputs]
    advance(layer, given)
    return sum(float((ours.hidden - theirs.hidden).square().sum()) for ours, theirs in zip(given, wanted, strict=True))


def test_scales_that_are_five_per_cent_off_are_mended(tiny: LoadedModel, samples: list[Sample], grid: Grid) -> None:
    layer, streams = working_layer(tiny, 0), list(capture(tiny, samples))
    right: dict[str, Coded] = {}
    for name in STANDARD.readers:
        weight = layer.linear(name).weight
        right[name] = code_gptq(weight.detach(), torch.eye(weight.shape[1]), grid)
        weight.data.copy_(right[name].values(grid))
    inputs = [replace(stream) for stream in streams]
    advance(layer, streams)
    wrong = {name: (grid, replace(coded, scale=to_f16(coded.scale * 1.05))) for name, coded in right.items()}
    for name, (_, coded) in wrong.items():
        layer.linear(name).weight.data.copy_(coded.values(grid))
    found = learn(layer, inputs, [stream.hidden for stream in streams], uniform, wrong, passes=90)
    assert found.keys() == wrong.keys()
    far = miss(layer, inputs, streams)
    for name, coded in found.items():
        layer.linear(name).weight.data.copy_(coded.values(grid))
    left = miss(layer, inputs, streams) / far
    assert left < LEFT
    for name, coded in found.items():
        assert torch.equal(coded.codes, right[name].codes)
        assert torch.equal(coded.scale, to_f16(coded.scale))
        assert torch.equal(coded.offset, to_f16(coded.offset))


def test_nothing_learned_is_the_rounded_matrix(grid: Grid) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    coded = code_gptq(weight, torch.eye(128), grid)
    assert torch.equal(Line.of(grid, coded).weight(), coded.values(grid))


def test_a_whole_model_takes_it(tiny: LoadedModel, samples: list[Sample]) -> None:
    settings = QuantiseSettings("MBQ3", learn_scales=20, synthetic=0)  # MBQ3S keeps scales to 3 %, which is more than is learned here
    plain, learned = (quantise(tiny, samples, chosen).quantised for chosen in (replace(settings, learn_scales=0), settings))
    assert any(plain[name].data.tobytes() != learned[name].data.tobytes() for name in plain)
    with pytest.raises(UsageError, match="--learn-scales with --propagate-error"):
        quantise(tiny, samples, replace(settings, propagate_error=False))
