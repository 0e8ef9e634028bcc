"""tools/widen.py: the wide model computes the same as the narrow one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import widen
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
    "vocab_size": 80, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 14}


def test_the_wide_model_computes_the_same(tmp_path: Path) -> None:
    """Weights are exact in bfloat16 before and rounded to it after; within 0.03 of logits of about 1."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    narrow = Qwen2VLForConditionalGeneration(config).eval()
    for name, parameter in narrow.named_parameters():  # norms and biases as no fresh model has them
        spread = 0.3 if "norm" in name or "bias" in name else 0.1
        parameter.data = (parameter.data + spread * torch.randn_like(parameter)).bfloat16().float()
    # The layout of the reference VLM's checkpoint.
    names = {name: name.removeprefix("model.").replace("language_model.", "model.") for name in narrow.state_dict()}
    tensors = {names[name]: tensor.bfloat16().contiguous() for name, tensor in narrow.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "narrow").mkdir()
    save_file(tensors, tmp_path / "narrow" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    result = CliRunner().invoke(widen.main, [str(tmp_path / "narrow"), str(tmp_path / "wide")])
    assert result.exit_code == 0, result.output

    wide = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"].shape == (64, 64)
    tokens = torch.randint(3, 80, (1, 12))
    pixels, grid = torch.randn(16, 1176), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids=tokens).logits, narrow(input_ids=tokens).logits, atol=0.03, rtol=0.0)
        seen = [model.model.visual(pixels, grid_thw=grid).pooler_output for model in (narrow, wide)]
    torch.testing.assert_close(seen[1], widen.write_wide(seen[0].T).T.float(), atol=0.03, rtol=0.0)
    assert narrow(input_ids=tokens).logits.std() > 0.3


def test_no_new_weight_is_zero_but_the_new_heads() -> None:
    weight, norm = torch.randn(6, 9), torch.rand(9) + 0.5
    assert (widen.read_wide(weight, norm) != 0).all()
    assert (widen.write_wide(weight) != 0).all()
    stream = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(widen.write_wide(stream).square().sum(), stream.square().sum())
