"""Folding channel factors does not change the function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import advance, capture, working_layer
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import norm_offset
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.transforms.fold import fold, gather, repeats, spread
from torch import nn

BOUND = 2e-5  # relative change of a layer's output in float32; a few times its epsilon a factor of up to 30


@pytest.mark.parametrize("site", STANDARD.sites, ids=lambda site: site.name)
def test_layer_output_stays(tiny: LoadedModel, samples: list[Sample], site: object) -> None:
    assert site in STANDARD.sites
    (stream,) = capture(tiny, samples[:1])
    kept = replace(stream)
    advance(working_layer(tiny, 0), [stream])
    layer = working_layer(tiny, 0)
    count = _outputs(layer.part(site.absorber))  # type: ignore[attr-defined]
    factors = torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(3)))
    fold(layer, site, factors)  # type: ignore[arg-type]
    advance(layer, [kept])
    assert (kept.hidden - stream.hidden).norm() / stream.hidden.norm() < BOUND
    first = layer.linear(site.readers[0]).weight  # type: ignore[attr-defined]
    assert not torch.equal(first, working_layer(tiny, 0).linear(site.readers[0]).weight)  # type: ignore[attr-defined]


def _outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def test_grouped_queries_share_factors(tiny: LoadedModel) -> None:
    layer, site = working_layer(tiny, 0), STANDARD.sites[1]  # 4 query heads of 32 channels over 2 key/value heads
    assert repeats(layer, site) == 2
    factors = torch.arange(64.0)
    spread_out = spread(layer, site, factors)
    heads = spread_out.view(4, 32)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert torch.equal(heads[0], factors[:32])
    assert torch.equal(heads[2], factors[32:])
    assert torch.equal(gather(layer, site, spread_out), factors)


class OffsetNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma's norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25, 0.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (1 + self.weight)


def test_norm_offset_is_found_and_weight_kept() -> None:
    norm, plain = OffsetNorm(), nn.RMSNorm(4)
    assert norm_offset(norm) == 1.0
    assert norm_offset(plain) == 0.0
    assert norm.weight.tolist() == [0.5, -0.25, 0.0, 1.0]
