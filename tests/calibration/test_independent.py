"""MBQ's ratios and exponents against a plain PyTorch program: one backward pass through the whole model, full forward passes of each
module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.prompts import AnswerMask
from mbq_gguf.quantise import quantise
from mbq_gguf.rounding.nearest import nearest_values
from mbq_gguf.settings import QuantiseSettings, SearchLoss

NAMES = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
# group: linears, inspected module, block
GROUPS = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attention"),
    "gate_up": (("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
    "down": (("mlp.down_proj",), "mlp.down_proj", "mlp"),
}
PAPER = QuantiseSettings(type_name="MBQ3", method="mbq", rounding="nearest", synthetic=0, propagate_error=False, grouped_o=False)


Key = tuple[str, int]  # block, layer


@pytest.fixture
def whole(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedModel]:
    """The tiny VLM in float32, whose graph begins at the embeddings; its products too, where the CPU would do them in bfloat16 (ratios
    differ by 8e-4 then)."""
    for module in ("walk.before", "walk.layer", "transforms.equalise"):
        monkeypatch.setattr(f"mbq_gguf.{module}.coarse_products", lambda device: nullcontext())
    weight = tiny.decoder.embed_tokens.weight
    with tiny.whole(torch.float32):
        weight.requires_grad_()
        yield tiny
        weight.requires_grad_(False).grad = None


def keep_output(outputs: dict[Key, torch.Tensor], key: Key, _module: object, _args: object, out: torch.Tensor) -> None:
    out.retain_grad()
    outputs[key] = out


@torch.enable_grad()
def plain_ratios(model: LoadedModel, samples: list[Sample], mask: AnswerMask) -> dict[str, torch.Tensor]:
    sums = {block: {name: torch.zeros(3) for name in ("vision", "answer")} for block in NAMES}
    for sample in samples:
        encoded = model.encode(sample.image, list(sample.turns))
        outputs: dict[Key, torch.Tensor] = {}
        handles = []
        for index, layer in enumerate(model.decoder.layers):
            for block, name in NAMES.items():
                handles.append(layer.get_submodule(name).register_forward_hook(partial(keep_output, outputs, (block, index))))
        labels = torch.where(encoded.answer, encoded.ids, -100)[None]
        model.model(**encoded.inputs, labels=labels, use_cache=False).loss.backward()
        for (block, index), out in outputs.items():
            assert out.grad is not None
            size = out.grad[0].abs().mean(dim=1)
            sums[block]["vision"][index] += size[encoded.vision].mean()
            sums[block]["answer"][index] += size[encoded.counted(mask)].mean()
        for handle in handles:
            handle.remove()
    ratios = {block: of["vision"] / of["answer"] for block, of in sums.items()}
    return {block: ratio.clamp(min=float(ratio.quantile(0.5))) for block, ratio in ratios.items()}


@torch.no_grad()
def plain_exponents(model: LoadedModel, samples: list[Sample], mask: AnswerMask, loss: SearchLoss) -> dict[str, dict[str, float]]:
    encoded = [model.encode(sample.image, list(sample.turns)) for sample in samples]
    vision, answer = (torch.cat(masks) for masks in ([e.vision for e in encoded], [e.counted(mask) for e in encoded]))
    ratios = plain_ratios(model, samples, mask)
    chosen: dict[str, dict[str, float]] = {}
    for index, layer in enumerate(model.decoder.layers):
        for group, (names, inspected, block) in GROUPS.items():
            module, linears = layer.get_submodule(inspected), [layer.get_submodule(name) for name in names]
            calls: list[tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]] = []
            handle = module.register_forward_pre_hook(lambda _m, args, kwargs, into=calls: into.append((args, kwargs)), with_kwargs=True)
            for each in encoded:
                model.model(**each.inputs, use_cache=False)
            handle.remove()

            def out(module: torch.nn.Module = module, calls: list = calls) -> torch.Tensor:  # type: ignore[type-arg]
                results = [module(*args, **kwargs) for args, kwargs in calls]
                return torch.cat([(result[0] if isinstance(result, tuple) else result)[0] for result in results])

            reference, kept = out(), [linear.weight.clone() for linear in linears]
            mean = torch.cat([(args[0] if args else kwargs["hidden_states"])[0] for args, kwargs in calls]).abs().mean(0)
            losses = []
            for k in range(20):
                s = (mean ** (k / 20)).clamp(min=1e-4)
                s /= (s.max() * s.min()).sqrt()
                for linear, weight in zip(linears, kept, strict=True):
                    linear.weight.copy_(nearest_values(weight * s, quant_type_for("MBQ3", weight.shape[1])) / s)
                error = out() - reference
                if loss == "mae":
                    losses.append(float(error[answer].abs().sum() + ratios[block][index] * error[vision].abs().sum()))
                else:
                    losses.append(float(error[answer].square().mean() + ratios[block][index] * error[vision].square().mean()))
            for linear, weight in zip(linears, kept, strict=True):
                linear.weight.copy_(weight)
            chosen.setdefault(f"layers.{index}", {})[group] = losses.index(min(losses)) / 20
    return chosen


@pytest.mark.parametrize("mask", ["header", "predicting", "answer"])
def test_ratios(whole: LoadedModel, samples: list[Sample], mask: AnswerMask) -> None:
    """To 1e-5: both are float32, in another order of operations."""
    last = [replace(sample, turns=sample.turns[-1:]) for sample in samples[:3]]
    expected = plain_ratios(whole, last, mask)
    found = quantise(whole, last, replace(PAPER, answer_mask=mask, search_samples=1)).ratios
    for block, ratios in expected.items():
        torch.testing.assert_close(torch.tensor(found[block]), ratios, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mask", "loss"), [("header", "mae"), ("header", "mse"), ("answer", "mae")])
def test_exponents(whole: LoadedModel, samples: list[Sample], mask: AnswerMask, loss: SearchLoss) -> None:
    """All nine of three layers are the same."""
    found = quantise(whole, samples[:3], replace(PAPER, answer_mask=mask, search_loss=loss)).exponents
    assert found == plain_exponents(whole, samples[:3], mask, loss)
    assert len({exponent for groups in found.values() for exponent in groups.values()}) > 2
