"""The generic adapter on small random models of other families: it finds their decoders, and their layers have the standard structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mbq_gguf.models.decoder import find_decoder
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def small(family: str, text: dict[str, Any], **config: Any) -> torch.nn.Module:
    settings = AutoConfig.for_model(family, text_config=text, **config)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForImageTextToText.from_config(settings)
    return model


QWEN = {"depth": 1, "embed_dim": 32, "num_heads": 2}
STANDARD = {
    "qwen2_5_vl": ({}, {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}}),
    "qwen3_vl": ({}, {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}}),
    "llava": ({"model_type": "llama"}, {"vision_config": {"model_type": "clip_vision_model", **VISION}}),
    "smolvlm": ({"model_type": "llama"}, {"vision_config": VISION}),
    "idefics3": ({"model_type": "llama"}, {"vision_config": VISION}),
    "internvl": ({"model_type": "qwen2"}, {"vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}}),
    "mistral3": ({"model_type": "mistral"}, {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16}}),
}


@pytest.mark.parametrize("family", sorted(STANDARD))
def test_decoder_is_found_and_standard(family: str) -> None:
    text, config = STANDARD[family]
    model = small(family, {**TEXT, **text}, **config)
    decoder = find_decoder(model, type(model).__name__)
    assert decoder is not None
    assert len(decoder.layers) == 2
    assert [decoder.layout.fault(layer) for layer in decoder.layers] == [None, None]
    assert decoder.head.in_features == decoder.embed_tokens.embedding_dim == 64
