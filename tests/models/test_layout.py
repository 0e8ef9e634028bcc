"""A family's features follow from its layout: Gemma 3, whose branches end in norms, against its own layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import advance, capture, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.errors import UsageError
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.decoder import find_decoder
from mbq_gguf.models.layer import norm_offset
from mbq_gguf.models.layouts import LAYOUTS, SANDWICH, STANDARD
from mbq_gguf.models.prompts import Encoded
from mbq_gguf.outcome import apply_outcome
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.transforms.fold import fold
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, PATCHES, TOKENS = 90, 4, 24
FOLDED = 2e-5  # relative change of a layer's output in float32; a few times its epsilon a factor of up to 30
SETTINGS = QuantiseSettings(type_name="MBQ3_64", synthetic=0, refits=0, clip=False, search_samples=1)


@dataclass
class Inputs:
    """Model inputs by number: this family's tokenizer and image processor are not what is tested."""

    def encode(self, image: Path, turns: list[tuple[str, str]]) -> Encoded:
        draw = torch.Generator().manual_seed(int(image.name))
        ids = torch.randint(1, IMAGE, (1, TOKENS), generator=draw)
        ids[0, 2 : 2 + PATCHES] = IMAGE
        vision = ids[0] == IMAGE
        pixels = torch.randn(1, 3, 28, 28, generator=draw)
        inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": vision[None].long()}
        answer = torch.arange(TOKENS) >= TOKENS - 6
        return Encoded(inputs, vision, answer, answer)


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    text: dict[str, Any] = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=PATCHES, image_token_index=IMAGE)
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # norms and the projector, which begin as constants
    architecture = type(model).__name__
    decoder = find_decoder(model, architecture)
    assert decoder is not None
    return LoadedModel(Path("gemma"), architecture, model, decoder, Inputs(), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


SAMPLES = [Sample(Path(str(number)), (("", ""),)) for number in range(3)]


def test_its_layers_are_what_the_layout_says(gemma: LoadedModel) -> None:
    assert gemma.decoder.layout is SANDWICH
    assert [SANDWICH.fault(layer) for layer in gemma.decoder.layers] == [None, None]
    assert STANDARD.fault(gemma.decoder.layers[0]) == "has a norm pre_feedforward_layernorm that no layout describes"
    assert norm_offset(gemma.decoder.layers[0].get_submodule("input_layernorm")) == 1.0


@torch.no_grad()
def test_layer_by_layer_is_the_whole_model(gemma: LoadedModel) -> None:
    streams = list(capture(gemma, SAMPLES))
    for index in range(2):
        advance(working_layer(gemma, index), streams)
    for stream, sample in zip(streams, SAMPLES, strict=True):
        inputs = gemma.encode(sample.image, list(sample.turns)).inputs
        whole = gemma.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(gemma.decoder.norm(stream.hidden), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("site", SANDWICH.sites, ids=lambda site: site.name)
def test_factors_fold_before_its_norms(gemma: LoadedModel, site: Any) -> None:
    (stream,) = capture(gemma, SAMPLES[:1])
    kept = replace(stream)
    layer = working_layer(gemma, 0)
    weight = layer.absorber(site).weight
    assert isinstance(weight, torch.Tensor)
    advance(working_layer(gemma, 0), [stream])
    fold(layer, site, torch.exp(torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(3))))
    advance(layer, [kept])
    assert (kept.hidden - stream.hidden).norm() / stream.hidden.norm() < FOLDED


@pytest.mark.parametrize("method", ["rtn", "mbq"])
def test_gptq_takes_it(gemma: LoadedModel, method: Any) -> None:
    """GPTQ from its own inputs is nearer to the original than rounding to nearest, by the last hidden states."""
    errors = []
    for settings in (replace(SETTINGS, method=method), replace(SETTINGS, rounding="nearest")):
        quantised = quantise(gemma, SAMPLES, settings)
        given, original = list(capture(gemma, SAMPLES)), list(capture(gemma, SAMPLES))
        for index in range(2):
            layer = working_layer(gemma, index)
            apply_outcome(layer, quantised.layer(index))
            advance(layer, given)
            advance(working_layer(gemma, index), original)
        errors.append(_distance(given, original))
    assert errors[0] < 0.9 * errors[1]


def _distance(given: list[Streamed], original: list[Streamed]) -> float:
    return sum(float((ours.hidden - theirs.hidden).square().sum()) for ours, theirs in zip(given, original, strict=True))


def test_rotation_is_refused_with_its_reason(gemma: LoadedModel) -> None:
    reason = r"Gemma3\w+ cannot be rotated, its layers have norms after their blocks \(post_attention_layernorm, .*: use --rotate none"
    with pytest.raises(UsageError, match=reason):
        quantise(gemma, SAMPLES, replace(SETTINGS, rotate="full"))


def test_a_layout_says_what_it_cannot_do() -> None:
    nowhere = replace(STANDARD, sites=tuple(replace(site, absorber=None) for site in STANDARD.sites))
    assert nowhere.no_equalisation() == "nothing before its matrices can absorb channel factors"
    assert STANDARD.no_equalisation() is None
    assert STANDARD.no_rotation() == "the linear that writes image features into the decoder is unknown"
    assert LAYOUTS["Qwen2VLForConditionalGeneration"].no_rotation() is None
