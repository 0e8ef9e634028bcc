"""Decoder keys, and the names of the same tensors in checkpoints."""

from __future__ import annotations

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.export.conversion import decoder_names

KEYS = ["layers.0.self_attn.q_proj.weight", "layers.11.mlp.norm.weight", "norm.weight", "embed_tokens.weight"]
TOWERS = [
    "visual.blocks.0.norm.weight",
    "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "model.visual.merger.norm.weight",
    "mtp.layers.0.x.weight",
]


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model.", "model.text_model."])
def test_decoder_is_found_below_any_prefix(prefix: str) -> None:
    names = [prefix + key for key in KEYS] + TOWERS + ["lm_head.weight"]
    assert decoder_names(dict.fromkeys(names)) == {key: prefix + key for key in KEYS} | {"lm_head.weight": "lm_head.weight"}


def test_two_decoders_are_refused() -> None:
    with pytest.raises(UserError, match=r"both a\.layers\.0\.x\.weight and b\.layers\.0\.x\.weight"):
        decoder_names(dict.fromkeys(["a.layers.0.x.weight", "b.layers.0.x.weight"]))
