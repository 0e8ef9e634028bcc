"""Readers that are rows of a fused linear: Phi-3, whose attention and MLP have one each, equals Llama with the same weights, bit for
bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import one_thread
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.importance import importance
from mbq_gguf.calibration.sensitivity import measure
from mbq_gguf.calibration.stream import capture, working_layer
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.decoder import Decoder
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Branch, Fused, Layout, Site
from mbq_gguf.models.layouts import STANDARD
from mbq_gguf.models.prompts import Encoded
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.transforms.fold import fold
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED = replace(
    STANDARD,
    fused=(
        Fused("self_attn.qkv_proj", QKV, first="self_attn.o_proj"),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
TOKENS, VISION = 24, slice(2, 8)
SAMPLES = [Sample(Path(str(number)), (("", ""),)) for number in range(4)]
PLAIN = QuantiseSettings(type_name="MBQ3S_64", synthetic=0)
SETTINGS = {
    "nearest": replace(PLAIN, rounding="nearest"),
    "GPTQ": PLAIN,
    "GPTQ from the original's inputs": replace(PLAIN, propagate_error=False, error_correction=0.0),
    "equalised, nearest": replace(PLAIN, method="awq", rounding="nearest"),
    "equalised, GPTQ": replace(PLAIN, method="awq", type_name="Q4_0"),
    "learned scales": replace(PLAIN, learn_scales=2),
}
SUMMED = 1e-5  # relative: one product over all rows of a fused linear and three products, added, in float32


@dataclass
class Ids:
    """Token ids by number, some of them in the place of a picture."""

    def encode(self, image: Path, turns: list[tuple[str, str]]) -> Encoded:
        ids = torch.randint(1, SIZES["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(int(image.name)))
        vision, answer = torch.zeros(TOKENS, dtype=torch.bool), torch.arange(TOKENS) >= TOKENS - 6
        vision[VISION] = True
        return Encoded({"input_ids": ids}, vision, answer, answer)


def loaded(family: str, layout: Layout) -> LoadedModel:
    config = AutoConfig.for_model(family, **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval().requires_grad_(False)
    decoder = Decoder("model", model.model, model.model.layers, model.model.norm, model.model.embed_tokens, model.lm_head, layout)
    return LoadedModel(Path(family), type(model).__name__, model, decoder, Ids(), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Three exponents, and products with one thread: how a library shares out rows is not what is tested."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr("mbq_gguf.transforms.equalise.EXPONENTS", (0.0, 0.3, 0.6))
        yield


@pytest.fixture(scope="module")
def phi() -> LoadedModel:
    """Random, norms too, and large enough that its layers matter beside the residual."""
    torch.manual_seed(7)
    found = loaded("phi3", FUSED)
    for parameter in found.model.parameters():
        parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def llama(phi: LoadedModel) -> LoadedModel:
    """The same weights in separate linears."""
    found = loaded("llama", STANDARD)
    weights = dict(phi.model.state_dict())
    for index in range(SIZES["num_hidden_layers"]):
        layer = Layer(phi.decoder.layers[index], index, FUSED)
        for name in FUSED.readers:
            weights[f"model.layers.{index}.{name}.weight"] = layer.linear(name).weight
        for name in FUSED.linears[:1] + FUSED.linears[2:3]:
            del weights[f"model.layers.{index}.{name}.weight"]
    found.model.load_state_dict(weights)
    return found


def split(result: QuantiseResult) -> dict[str, bytes]:
    """The bytes of every quantised matrix, those of fused ones apart."""
    rows = {"q": 64, "k": 32, "v": 32, "gate": 128, "up": 128}
    out = {}
    for name, quantised in result.quantised.items():
        names = {"qkv_proj": "q k v", "gate_up_proj": "gate up"}.get(name.split(".")[-2])
        start = 0
        for part in (names or "").split():
            out[f"{name.rsplit('.', 2)[0]}.{part}_proj.weight"] = quantised.data[start : start + rows[part]].tobytes()
            start += rows[part]
        assert names is None or start == len(quantised.data)
        if names is None:
            out[name] = quantised.data.tobytes()
    return out


def test_the_layout_is_what_the_layers_are(phi: LoadedModel) -> None:
    assert [FUSED.fault(layer) for layer in phi.decoder.layers] == [None, None]
    assert STANDARD.fault(phi.decoder.layers[0]) == "has no linear self_attn.q_proj"
    assert FUSED.linears == ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    odd = replace(FUSED, fused=(replace(FUSED.fused[0], first="mlp.down_proj"), FUSED.fused[1]))
    assert "has a linear self_attn.qkv_proj that does not consist of self_attn.q_proj" in str(odd.fault(phi.decoder.layers[0]))


def test_rows_are_the_layers_own_memory(phi: LoadedModel) -> None:
    layer = working_layer(phi, 0)
    whole = layer.part("self_attn.qkv_proj").weight
    assert isinstance(whole, torch.Tensor)
    layer.linear("self_attn.k_proj").weight.data.fill_(3.0)
    assert torch.equal(whole == 3.0, torch.arange(128)[:, None].expand(128, 64).sub(64).div(32, rounding_mode="floor") == 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_bytes_as_separate_linears(phi: LoadedModel, llama: LoadedModel, name: str) -> None:
    fused, separate = (quantise(model, SAMPLES, SETTINGS[name]) for model in (phi, llama))
    assert split(fused) == split(separate)
    assert fused.replaced.keys() == separate.replaced.keys()
    assert all(torch.equal(fused.replaced[key], separate.replaced[key]) for key in fused.replaced)
    assert fused.exponents == separate.exponents
    assert bool(fused.replaced) == (SETTINGS[name].method == "awq")


def test_gradients_are_those_of_separate_linears(phi: LoadedModel, llama: LoadedModel) -> None:
    fused, separate = (measure(model, list(capture(model, SAMPLES)), fisher=True).tensors() for model in (phi, llama))
    assert fused.keys() == separate.keys()
    for name, value in fused.items():
        torch.testing.assert_close(value, separate[name], rtol=SUMMED, atol=SUMMED * float(value.abs().max()))


def test_a_fused_linear_gets_one_type(phi: LoadedModel) -> None:
    result = quantise(phi, SAMPLES, replace(PLAIN, target_bpw=5.0))
    assert result.plan is not None
    assert {name: quantised.type_name for name, quantised in result.quantised.items()} == result.plan.type_names
    assert set(result.quantised) == {f"layers.{i}.{name}.weight" for i in range(2) for name in FUSED.linears} == set(result.losses)
    assert result.plan.weights["layers.0.self_attn.qkv_proj.weight"] == 128 * 64


def test_the_importance_matrix_names_the_fused_linear(phi: LoadedModel, llama: LoadedModel) -> None:
    fused, separate = (importance(model, capture(model, SAMPLES)).sums for model in (phi, llama))
    assert set(fused) == {f"layers.{i}.{name}.weight" for i in range(2) for name in FUSED.linears}
    assert torch.equal(fused["layers.1.self_attn.qkv_proj.weight"], separate["layers.1.self_attn.v_proj.weight"])


VISION_QKV = ("attn.q", "attn.k", "attn.v")
VISION_BLOCK = Layout(
    (
        Site("qkv", VISION_QKV, "norm1", "attn", "attention"),
        Site("proj", ("attn.proj",), "attn.v", "attn.proj", "attention"),
        Site("fc1", ("mlp.fc1",), "norm2", "mlp", "mlp"),
        Site("fc2", ("mlp.fc2",), None, "mlp.fc2", "mlp"),
    ),
    (Branch("attention", "attn", "attn.proj"), Branch("mlp", "mlp", "mlp.fc2")),
    norms=("norm1", "norm2"),
    fused=(Fused("attn.qkv", VISION_QKV),),
)


@torch.no_grad()
@pytest.mark.parametrize("site", VISION_BLOCK.sites[:3], ids=lambda site: site.name)
def test_factors_fold_into_rows_with_their_biases(site: Site) -> None:
    """Qwen2-VL's vision block: LayerNorms and biases, and a fused qkv whose last third takes proj's factors."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("qwen2_vl").vision_config
    config.embed_dim, config.num_heads, config._attn_implementation = 32, 2, "sdpa"
    block: nn.Module = Qwen2VLVisionBlock(config).eval()
    for parameter in block.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    assert VISION_BLOCK.fault(block) is None
    angles = torch.randn(TOKENS, 16)
    inputs = {"cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32), "position_embeddings": (angles.cos(), angles.sin())}
    hidden = torch.randn(TOKENS, 32)
    before = block(hidden, **inputs)
    layer = Layer(block, 0, VISION_BLOCK)
    weights = {name: value.clone() for name, value in block.named_parameters()}
    fold(layer, site, torch.exp(torch.randn(32)))
    changed = {name for name, value in block.named_parameters() if not torch.equal(value, weights[name])}
    expected = {"qkv": {"norm1.weight", "norm1.bias", "attn.qkv.weight"}, "proj": {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"}}
    assert changed == expected.get(site.name, {"norm2.weight", "norm2.bias", "mlp.fc1.weight"})
    assert float((block(hidden, **inputs) - before).norm() / before.norm()) < SUMMED
