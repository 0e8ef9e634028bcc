"""SmoothQuant's factors computed by hand, and a folded layer computes the same as before."""

from __future__ import annotations

import torch
from mbq_gguf.calibration.calls import Entering
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import advance, capture, run_batch, working_layer
from mbq_gguf.models import LoadedModel
from mbq_gguf.transforms.layer import fold_layer
from mbq_gguf.transforms.smooth import smooth_factors, smooth_layer


def test_factors_by_hand() -> None:
    largest = torch.tensor([16.0, 1.0, 0.0])
    weights = [torch.tensor([[1.0, -4.0, 1.0]]), torch.tensor([[-0.25, 2.0, 0.5]])]
    torch.testing.assert_close(smooth_factors(largest, weights), torch.tensor([4.0, 0.5, 1e-5**0.5]))


def test_factors_are_those_of_what_enters_and_change_nothing(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(capture(tiny, samples[:2]))
    layer = working_layer(tiny, 1)
    advance(working_layer(tiny, 0), streams)
    factors = smooth_layer(Entering(layer, streams), layer.sites)
    assert set(factors) == {"qkv", "gate_up"}

    norm = layer.part("input_layernorm")
    entering = torch.cat([norm(stream.hidden)[0] for stream in streams])
    weights = [layer.linear(f"self_attn.{name}_proj").weight for name in "qkv"]
    torch.testing.assert_close(factors["qkv"], smooth_factors(entering.abs().amax(0), weights))

    before = run_batch(layer, streams[:1])
    fold_layer(layer, factors)
    torch.testing.assert_close(run_batch(layer, streams[:1]), before, rtol=1e-4, atol=1e-5)  # float32 in another order
