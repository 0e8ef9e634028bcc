"""Samples that pass a layer in one batch give the same results as alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration import batches as module
from mbq_gguf.calibration.batches import batches, joined
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.stream import advance, capture, capture_encoded, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer

ROUNDING = 1e-5  # of the largest entry: float32 products of other sizes are summed in another order
BFLOAT16 = 2e-2  # the same in bfloat16


@pytest.fixture
def streams(tiny: LoadedModel, samples: list[Sample]) -> list[Streamed]:
    """Pictures of several lengths, then texts of one length and of another."""
    texts = [torch.arange(length) % 7 + 20 for length in (9, 9, 9, 5)]
    return [*capture(tiny, samples[:3]), *(capture_encoded(tiny, tiny.encode_text(ids)) for ids in texts)]


def copies(streams: list[Streamed]) -> list[Streamed]:
    return [replace(stream) for stream in streams]


@pytest.mark.parametrize("tokens", [20, 250, 5000])
@pytest.mark.parametrize("low", [False, True])
def test_together_as_alone(tiny: LoadedModel, streams: list[Streamed], tokens: int, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", tokens)
    layer, together = working_layer(tiny, 0), copies(streams)
    with torch.no_grad():
        alone = [layer.run(stream.hidden, stream.kwargs[0]) for stream in streams]
    if low:
        with coarse_products(layer.device):
            advance(layer, together)
    else:
        advance(layer, together)
    for found, expected in zip(together, alone, strict=True):
        assert found.hidden.shape == expected.shape
        assert float((found.hidden - expected).abs().max() / expected.abs().max()) < (BFLOAT16 if low else ROUNDING)


def test_batches_keep_order_and_size(tiny: LoadedModel, streams: list[Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(streams[0].ids) + len(streams[1].ids)
    monkeypatch.setattr(module, "TOKENS", limit)
    found = list(batches(streams, working_layer(tiny, 0)))
    assert [stream for batch in found for stream in batch] == streams
    assert 1 < len(found) < len(streams)
    assert all(sum(len(stream.ids) for stream in batch) <= limit for batch in found if len(batch) > 1)


def of_a_card(layer: Layer) -> Layer:
    """The same layer where it does not compute, which a batch's size is that of a card for."""
    return replace(layer, module=layer.copy().module.to("meta"))


@pytest.mark.parametrize("least", [1, 64, 4096])
def test_batches_of_a_card_are_even_and_as_many_as_cards_share(
    tiny: LoadedModel, streams: list[Streamed], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [replace(stream) for stream in streams * 12]
    total = sum(len(stream.ids) for stream in many)
    monkeypatch.setattr(module, "TOKENS", least)
    monkeypatch.setattr(module, "TOKENS_ON_CARD", total // (2 * module.SHARES) - 1)  # which is too little for twice SHARES
    found = list(batches(many, of_a_card(working_layer(tiny, 0))))
    assert [stream for batch in found for stream in batch] == many
    expected = min(3 * module.SHARES, -(-total // least))
    assert len(found) == expected
    longest = max(len(stream.ids) for stream in many)
    assert all(abs(sum(len(stream.ids) for stream in batch) - total / expected) <= longest for batch in found)


def test_a_long_sample_leaves_no_empty_batch(tiny: LoadedModel, streams: list[Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", 8)
    texts = streams[-4:]
    texts.insert(2, capture_encoded(tiny, tiny.encode_text(torch.arange(200) % 7 + 20)))
    found = list(batches(texts, of_a_card(working_layer(tiny, 0))))
    assert [stream for batch in found for stream in batch] == texts
    assert all(found)


def test_what_a_layer_has_left_is_joined_without_a_copy(tiny: LoadedModel, streams: list[Streamed]) -> None:
    (batch,) = batches(streams, working_layer(tiny, 0))
    first = joined(batch, 0)[0]
    assert first.equal(torch.cat([stream.hidden for stream in batch], dim=1))
    assert first.data_ptr() != batch[0].hidden.data_ptr()
    advance(working_layer(tiny, 0), batch)
    for some in (batch, batch[1:4]):
        found = joined(some, 1)[0]
        assert found.equal(torch.cat([stream.hidden for stream in some], dim=1))
        assert found.data_ptr() == some[0].hidden.data_ptr()
    for some in (batch[::-1], batch[::2], [batch[0], batch[0]]):
        assert joined(some, 1)[0].equal(torch.cat([stream.hidden for stream in some], dim=1))


def test_a_sample_with_a_mask_or_other_arguments_goes_alone(tiny: LoadedModel, streams: list[Streamed]) -> None:
    streams[1].kwargs[0] = streams[1].kwargs[0] | {"attention_mask": torch.ones(1, 1, 2, 2)}
    streams[4].kwargs[0] = streams[4].kwargs[0] | {"use_cache": True}
    assert [len(batch) for batch in batches(streams, working_layer(tiny, 0))] == [1, 1, 2, 1, 2]
    assert [len(batch) for batch in batches(streams, working_layer(tiny, 1))] == [7]
