"""Layer-by-layer gradients against one backward pass through the whole model, and the statistics derived from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mbq_gguf.calibration import sensitivity
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.gradient_sums import CLASSES
from mbq_gguf.calibration.sensitivity import Sensitivity, measure
from mbq_gguf.calibration.stream import advance, capture, logits, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layouts import STANDARD

BOUND = 1e-5  # relative; both are float32, in another order of operations


def full_autograd(tiny: LoadedModel, sample: Sample) -> dict[tuple[str, int], torch.Tensor]:
    """dL/dY [tokens, channels] by linear and layer, from the model's own forward with labels."""
    encoded = tiny.encode(sample.image, list(sample.turns))
    labels = torch.where(encoded.answer, encoded.ids, -100)[None]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(tiny.decoder.layers):
        for name in STANDARD.readers:

            def hook(_m: object, _i: object, grads: tuple[torch.Tensor], key: tuple[str, int] = (name, index)) -> None:
                seen[key] = grads[0][0]

            handles.append(layer.get_submodule(name).register_full_backward_hook(hook))
    embedding = tiny.decoder.embed_tokens.weight.requires_grad_()
    with tiny.whole(torch.float32):
        tiny.model(**encoded.inputs, labels=labels, use_cache=False).loss.backward()
    embedding.requires_grad_(False)
    embedding.grad = None
    for handle in handles:
        handle.remove()
    return seen


def test_equals_full_autograd(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(capture(tiny, samples[:3]))
    found = measure(tiny, streams)
    expected = [full_autograd(tiny, sample) for sample in samples[:3]]
    layers = range(len(tiny.decoder.layers))
    for block, watched in ((branch.name, branch.writer) for branch in STANDARD.branches):
        for name in CLASSES:
            masks = [getattr(stream, name) for stream in streams]
            means = [[e[watched, i].abs().mean(1)[m].mean() for i in layers] for e, m in zip(expected, masks, strict=True)]
            torch.testing.assert_close(found.mean[block][name], torch.tensor(means).mean(0).double(), rtol=BOUND, atol=0)


def test_salience_shares_the_fisher_out(tiny: LoadedModel, samples: list[Sample]) -> None:
    found = measure(tiny, list(capture(tiny, samples[:3])), fisher=True)
    for place, site in enumerate(STANDARD.sites):
        sizes = {name: tiny.decoder.layers[0].get_submodule(name).out_features for name in site.readers}
        whole = sum(found.fisher[name] * size for name, size in sizes.items()) / sum(sizes.values())
        shares = torch.stack([salience[:, place].sum(dim=1) / 2 for salience in found.salience]).mean(0)
        torch.testing.assert_close(shares.double(), whole, rtol=BOUND, atol=0)


def test_samples_of_equal_length_may_be_stacked(tiny: LoadedModel, samples: list[Sample]) -> None:
    one, other = capture(tiny, [samples[0], samples[0]])
    other.labels = other.labels.clone()
    other.labels[other.labels.nonzero()[0]] = False  # answers of different lengths
    other.hidden = other.hidden.roll(1, dims=1)
    both = Streamed(
        torch.cat([one.hidden, other.hidden]),
        one.kwargs,
        *(torch.stack([getattr(one, name), getattr(other, name)]) for name in ("ids", "vision", "answer", "labels")),
    )
    apart, together = measure(tiny, [one, other], fisher=True), measure(tiny, [both], fisher=True)
    torch.testing.assert_close(together.salience[0], torch.stack(apart.salience), rtol=1e-3, atol=1e-6 * float(apart.salience[0].max()))
    for name, value in apart.tensors().items():
        if not name.startswith("salience"):
            torch.testing.assert_close(together.tensors()[name], value, rtol=BOUND, atol=0)


def test_saved_and_restored(tiny: LoadedModel, samples: list[Sample]) -> None:
    found = measure(tiny, list(capture(tiny, samples[:2])), fisher=True)
    again = Sensitivity.restored(found.tensors())
    assert again.tensors().keys() == found.tensors().keys()
    assert all(torch.equal(again.tensors()[name], value) for name, value in found.tensors().items())


@pytest.mark.parametrize(("name", "index"), [("self_attn.v_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 2)])
def test_fisher_predicts_the_divergence_that_noise_costs(
    tiny: LoadedModel, samples: list[Sample], name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides are means of random draws: one probe is 10 % off and one noise 15 % (standard deviations of v_proj, the widest)."""
    streams = list(capture(tiny, samples))
    probes = []
    for seed in range(4):
        monkeypatch.setattr(sensitivity, "PROBE_SEED", seed)
        probes.append(float(measure(tiny, streams, fisher=True).fisher[name][index]))
    fisher = sum(probes) / len(probes)
    original = answers(tiny, streams)
    size = 0.05

    def noise(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + size * torch.randn(output.shape, generator=draw)

    found = []
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        noisy = answers(tiny, streams, index, lambda layer: layer.part(name).register_forward_hook(noise))
        found += [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(original, noisy, strict=True)]
    channels = tiny.decoder.layers[index].get_submodule(name).out_features
    # 3 standard errors: 3 * hypot(0.10 / 2, 0.15 / 8**0.5)
    assert sum(found) / len(found) == pytest.approx(fisher * channels * size**2, rel=0.22)


@torch.no_grad()
def answers(
    tiny: LoadedModel, streams: list[Streamed], changed: int = -1, change: Callable[[Layer], object] = lambda layer: None
) -> list[torch.Tensor]:
    """Log-probabilities of each stream's answer tokens, ``change`` made to layer number ``changed``."""
    running = [replace(stream) for stream in streams]
    for index in range(len(tiny.decoder.layers)):
        layer = working_layer(tiny, index)
        if index == changed:
            change(layer)
        advance(layer, running)
    return [logits(tiny, stream.hidden[0, :-1][stream.labels[1:]]).double().log_softmax(-1) for stream in running]


def test_parts_change_nothing(tiny: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = list(capture(tiny, samples[:2]))
    whole = measure(tiny, streams, fisher=True)
    monkeypatch.setattr(sensitivity, "HOST_BYTES", 1)
    parts = measure(tiny, streams, fisher=True)
    for block in whole.mean:
        for name in CLASSES:
            torch.testing.assert_close(parts.mean[block][name], whole.mean[block][name], rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(parts.salience, whole.salience, strict=True))


EVEN = {"vision": [1.0, 2.0, 3.0, 4.0], "answer": [1.0] * 4, "prompt": [1.0] * 4}


def test_ratio_and_floor_by_hand() -> None:
    classes = {"vision": torch.tensor([1.0, 4.0, 9.0]), "answer": torch.tensor([2.0, 2.0, 3.0]), "prompt": torch.ones(3)}
    found = Sensitivity({"attention": classes, "mlp": {**classes, "answer": torch.tensor([0.0, 4.0, 9.0])}}, {}, [])
    assert found.ratios(floor=False)["attention"] == [0.5, 2.0, 3.0]
    assert found.ratios(floor=True)["attention"] == [2.0, 2.0, 3.0]  # the median is 2
    assert found.ratios(floor=False)["mlp"] == [1.0, 1.0, 1.0]  # no answer gradient: ratio 1
    even = Sensitivity({"mlp": {name: torch.tensor(value).double() for name, value in EVEN.items()}}, {}, [])
    assert even.ratios(floor=True)["mlp"] == [2.5, 2.5, 3.0, 4.0]  # the mean of the two in the middle, as numpy has it
    assert found.class_weights("attention", 2) == {"vision": 3.0, "answer": 1.0, "prompt": pytest.approx(1 / 3)}
    assert found.class_weights("mlp", 0) == {"vision": 1.0, "answer": 1.0, "prompt": 1.0}
