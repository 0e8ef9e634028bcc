"""Layer-by-layer gradients against one backward pass through the whole model."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.calibration import sensitivity
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.sensitivity import CLASSES, WATCHED, Sensitivity, measure
from mbq_gguf.calibration.stream import capture
from mbq_gguf.models import LoadedModel

BOUND = 1e-5  # relative; both are float32, in another order of operations


def full_autograd(tiny: LoadedModel, sample: Sample) -> dict[str, dict[str, list[float]]]:
    """Mean |dL/dY| by block and class of every layer, from the model's own forward with labels."""
    encoded = tiny.encode(sample.image, list(sample.turns))
    labels = torch.where(encoded.answer, encoded.ids, -100)[None]
    tiny.decoder.layers.float()
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(tiny.decoder.layers):
        for block, name in WATCHED.items():

            def hook(_m: object, _i: object, grads: tuple[torch.Tensor], key: tuple[str, int] = (block, index)) -> None:
                seen[key] = grads[0][0]

            handles.append(layer.get_submodule(name).register_full_backward_hook(hook))
    embedding = tiny.decoder.embed_tokens.weight.requires_grad_()
    tiny.model(**encoded.inputs, labels=labels, use_cache=False).loss.backward()
    embedding.requires_grad_(False)
    embedding.grad = None
    for handle in handles:
        handle.remove()
    tiny.decoder.layers.bfloat16()
    masks = {"vision": encoded.vision, "answer": encoded.answer, "prompt": ~(encoded.vision | encoded.answer)}
    layers = range(len(tiny.decoder.layers))
    return {b: {c: [float(seen[b, i].abs().mean(1)[m].mean()) for i in layers] for c, m in masks.items()} for b in WATCHED}


def test_equals_full_autograd(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(capture(tiny, samples[:3]))
    found = measure(tiny, streams)
    expected = [full_autograd(tiny, sample) for sample in samples[:3]]
    for block in WATCHED:
        for name in CLASSES:
            mean = torch.tensor([e[block][name] for e in expected]).mean(0).double()
            torch.testing.assert_close(found.mean[block][name], mean, rtol=BOUND, atol=0)


def test_parts_change_nothing(tiny: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = list(capture(tiny, samples[:2]))
    whole = measure(tiny, streams)
    monkeypatch.setattr(sensitivity, "HOST_BYTES", 1)
    parts = measure(tiny, streams)
    for block in WATCHED:
        for name in CLASSES:
            torch.testing.assert_close(parts.mean[block][name], whole.mean[block][name], rtol=1e-12, atol=0)


def test_ratio_and_floor_by_hand() -> None:
    classes = {"vision": torch.tensor([1.0, 4.0, 9.0]), "answer": torch.tensor([2.0, 2.0, 3.0]), "prompt": torch.ones(3)}
    found = Sensitivity({"attention": classes, "mlp": {**classes, "answer": torch.tensor([0.0, 4.0, 9.0])}})
    assert found.ratios(floor=False)["attention"] == [0.5, 2.0, 3.0]
    assert found.ratios(floor=True)["attention"] == [2.0, 2.0, 3.0]  # the median is 2
    assert found.ratios(floor=False)["mlp"] == [1.0, 1.0, 1.0]  # no answer gradient: ratio 1
