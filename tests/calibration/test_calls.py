"""The calls on which a search compares candidates, against running the layer sample by sample."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration import calls as calls_module
from mbq_gguf.calibration.calls import Entering, observed_calls
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import capture, capture_encoded, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.models.layouts import STANDARD

BOUND = 2e-5  # relative to the largest; float32, samples in one product or apart


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=BOUND * float(expected.abs().max()))


@torch.no_grad()
def seen(layer: Layer, stream: Streamed, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of the site's linears and output of its inspected module, for one sample alone."""
    found: dict[str, torch.Tensor] = {}
    first = layer.part(site.readers[0]).register_forward_pre_hook(lambda _m, args: found.update(x=args[0][0]))
    last = layer.part(site.inspected).register_forward_hook(
        lambda _m, _a, out: found.update(y=(out[0] if isinstance(out, tuple) else out)[0])
    )
    layer.run(stream.hidden, stream.kwargs[0])
    first.remove()
    last.remove()
    return found["x"], found["y"]


@pytest.mark.parametrize("site", STANDARD.sites, ids=lambda site: site.name)
@pytest.mark.parametrize("room", [0, calls_module.DEVICE_BYTES])
def test_calls_are_the_layers_own(tiny: LoadedModel, samples: list[Sample], site: Site, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of two samples and a mean over three; a text without an answer is in neither."""
    monkeypatch.setattr(calls_module, "DEVICE_BYTES", room)
    streams = list(capture(tiny, samples[:3]))
    synthetic = capture_encoded(tiny, tiny.encode_text(torch.arange(10, 40)))
    layer = working_layer(tiny, 0)
    calls, mean = observed_calls(Entering(layer, [*streams, synthetic]), None, site, uniform, 2)
    xs, ys = zip(*(seen(layer, stream, site) for stream in streams), strict=True)
    assert [call.lengths for call in calls] == [tuple(len(x) for x in xs[:2])]
    close(calls[0].output, torch.cat(ys[:2]))
    with torch.no_grad():
        close(calls[0].run(layer.part(site.inspected)), torch.cat(ys[:2]))
    close(mean, torch.cat(xs).abs().mean(0))


def test_rounded_inputs_meet_the_originals_outputs(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams, others = list(capture(tiny, samples[:2])), list(capture(tiny, samples[:2]))
    for stream in others:
        stream.hidden = stream.hidden * 1.5 + 0.1
    layer, site = working_layer(tiny, 0), STANDARD.sites[3]
    (call,), mean = observed_calls(Entering(layer, streams), Entering(layer, others), site, uniform, None)
    close(call.output, torch.cat([seen(layer, stream, site)[1] for stream in streams]))
    x = torch.cat([seen(layer, stream, site)[0] for stream in others])
    close(call.args[0][0], x)
    close(mean, x.abs().mean(0))
