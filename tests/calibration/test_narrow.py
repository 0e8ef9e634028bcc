"""The decoder in few bits while it generates texts: close to the stored one, chosen by the device's free memory, and removed afterwards."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration import narrow
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.generate import written_texts
from mbq_gguf.calibration.narrow import Narrow, bits_with_room, in_bits
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.lazy import LazyTensor
from torch import nn


@pytest.mark.parametrize(("bits", "columns"), [(8, 192), (4, 192), (8, 50), (4, 50)])
def test_a_matrix_is_within_half_a_step(bits: int, columns: int) -> None:
    """A step is the largest weight of a group over 127 or 7; rows that are no multiple of 64 are one group."""
    torch.manual_seed(0)
    module = nn.Linear(columns, 24)
    made = Narrow(module, bits)
    group = 64 if columns % 64 == 0 else columns
    step = module.weight.detach().view(24, -1, group).abs().amax(dim=2) / (127 if bits == 8 else 7)
    error = (made.weight(torch.float32) - module.weight).view(24, -1, group).abs().amax(dim=2)
    assert (error <= 0.501 * step).all()
    assert made.codes.nbytes == 24 * columns * bits // 8
    x = torch.randn(3, columns)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight(torch.float32), module.bias))


@torch.no_grad()
def test_the_models_logits_stay_near(tiny: LoadedModel, samples: list[Sample]) -> None:
    """Measured 0.005 and 0.10 of the logits' norm."""
    inputs = tiny.encode(samples[0].image, list(samples[0].turns)).inputs
    found = {}
    for bits in (32, 8, 4):
        with in_bits(tiny, bits, torch.float32):
            found[bits] = tiny.model(**inputs, use_cache=False).logits
    assert all(isinstance(parameter, LazyTensor) for parameter in tiny.decoder.layers.parameters())
    assert all(isinstance(linear, nn.Linear) for _, linear in tiny.decoder.linears())
    for bits, bound in ((8, 0.02), (4, 0.3)):
        error = float((found[bits] - found[32]).norm() / found[32].norm())
        assert bound / 20 < error < bound, bits


def test_the_most_bits_with_room_are_taken(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = sum(linear.weight.numel() for _, linear in tiny.decoder.linears())
    found = []
    for share in (4.0, 2.1, 1.2, 0.7):  # bytes a weight
        monkeypatch.setattr(narrow, "available", lambda device, share=share: round(matrices * share * 1.1 / narrow.SHARE))
        found.append(bits_with_room(tiny, torch.float32))
    assert found == [32, 8, 8, 4]
    monkeypatch.setattr(narrow, "available", lambda device: matrices // 2)
    with pytest.raises(UserError, match=r"has no room for the decoder.*--synthetic 0"):
        bits_with_room(tiny, torch.float32)
    monkeypatch.setattr(narrow, "available", lambda device: matrices)
    assert written_texts(tiny, 2, 8, 1.6, 0, lambda done, total: None).shape == (2, 8)
