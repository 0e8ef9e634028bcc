"""Running layer by layer equals running the whole model, and statistics are correct."""

from __future__ import annotations

import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.observe import observe
from mbq_gguf.calibration.stream import advance, capture, logits, working_layer
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.threads import torch_threads


@torch.no_grad()
def test_streamed_logits_equal_the_models(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(capture(tiny, samples[:2]))
    for index in range(len(tiny.decoder.layers)):
        advance(working_layer(tiny, index), streams)
    for stream, sample in zip(streams, samples, strict=False):
        with tiny.whole(torch.float32):
            whole = tiny.model(**tiny.encode(sample.image, list(sample.turns)).inputs, use_cache=False).logits
        torch.testing.assert_close(logits(tiny, stream.hidden), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_workers_capture_the_bits_of_one(tiny: LoadedModel, samples: list[Sample]) -> None:
    found = []
    for workers in (1, 2):
        with torch_threads(workers):  # one each
            found.append(list(capture(tiny, samples, workers=workers)))
    for one, other in zip(*found, strict=True):
        assert one.hidden.equal(other.hidden)
        assert one.ids.equal(other.ids)
        assert one.labels.equal(other.labels)
        for mine, its in zip(one.kwargs[0]["position_embeddings"], other.kwargs[0]["position_embeddings"], strict=True):
            assert mine.equal(its)


def test_shared_tensors_are_kept_once(tiny: LoadedModel, samples: list[Sample]) -> None:
    (stream,) = capture(tiny, samples[:1])
    first, second = (stream.kwargs[i]["position_embeddings"][0] for i in range(2))
    assert first is second


def test_masks_part_the_tokens(tiny: LoadedModel, samples: list[Sample]) -> None:
    (stream,) = capture(tiny, samples[:1])
    total = stream.vision.int() + stream.answer.int() + stream.prompt.int()
    assert torch.equal(total, torch.ones_like(total))
    assert stream.vision.any()
    assert stream.answer.any()


def test_token_weights_by_hand(tiny: LoadedModel, samples: list[Sample]) -> None:
    (stream,) = capture(tiny, samples[:1])
    attention, mlp = STANDARD.sites[0], STANDARD.sites[2]
    weigh = modality({"attention": [9.0, 0.25], "mlp": [9.0, 4.0]}, 1)
    assert set(weigh(stream, attention)[stream.vision].tolist()) == {0.25}
    assert set(weigh(stream, mlp)[stream.vision].tolist()) == {4.0}
    assert set(weigh(stream, mlp)[stream.answer].tolist()) == {1.0}
    assert set(weigh(stream, mlp)[stream.prompt].tolist()) == {0.0}
    assert set(uniform(stream, mlp).tolist()) == {1.0}


def test_statistics_equal_those_of_all_tokens_at_once(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(capture(tiny, samples[:3]))
    layer = working_layer(tiny, 0)
    with torch.no_grad():
        x = torch.cat([layer.module.input_layernorm(stream.hidden)[0] for stream in streams])
    weights = modality({"attention": [0.5], "mlp": [0.5]}, 0)
    weight = torch.cat([weights(stream, STANDARD.sites[0]) for stream in streams])
    found = observe(layer, streams, hessian_weights=weights).hessians["qkv"]
    torch.testing.assert_close(found, x.t() @ (x * weight[:, None]), rtol=1e-4, atol=1e-3)


def test_observing_moves_the_streams_on(tiny: LoadedModel, samples: list[Sample]) -> None:
    plain, observed = list(capture(tiny, samples[:1])), list(capture(tiny, samples[:1]))
    advance(working_layer(tiny, 0), plain)
    found = observe(working_layer(tiny, 0), observed, hessian_weights=None)
    assert torch.equal(plain[0].hidden, observed[0].hidden)
    assert not found.hessians
