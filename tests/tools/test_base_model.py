"""tools/base_model.py: on a text, the model equals the GGUF's own tensors in transformers' Llama, with channels in their original order."""

from __future__ import annotations

from pathlib import Path

import base_model
import pytest
import torch
from click.testing import CliRunner
from mbq_gguf.demo.assemble import DATA, read_language_model
from mbq_gguf.demo.base_model import base_gguf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration


@pytest.mark.slow
def test_it_is_the_text_model(tmp_path: Path) -> None:
    """Mean divergence within 1e-4 nats: one side's weights are rounded to bfloat16."""
    done = CliRunner().invoke(base_model.main, [str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    text = Qwen2VLConfig.from_pretrained(DATA).text_config
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    rope = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    config = LlamaConfig(**{name: getattr(text, name) for name in same}, rope_parameters=rope, tie_word_embeddings=True)
    theirs = LlamaForCausalLM(config).eval()
    state = {name: tensor for name, tensor in read_language_model(base_gguf(), text).items() if not name.endswith(".bias")}
    theirs.model.load_state_dict(state)
    mine = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(
        "The capital of France is Paris, and its river is", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (theirs, mine))
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= 1e-4
