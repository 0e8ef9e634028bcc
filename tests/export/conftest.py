"""Checkpoints from which the export tests make GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LLAMA_HIDDEN, LLAMA_HEADS, LLAMA_KV_HEADS, LLAMA_FORWARD, LLAMA_LAYERS = 64, 4, 2, 96, 2


@pytest.fixture(scope="session")
def llama_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, whose q and k rows llama.cpp reorders; stored as LLaVA stores its language model. Read only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=LLAMA_HIDDEN,
        intermediate_size=LLAMA_FORWARD,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=LLAMA_HEADS,
        num_key_value_heads=LLAMA_KV_HEADS,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    folder.mkdir()
    state = {f"language_model.{name}": value.detach().to(torch.bfloat16).clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_dir / name, folder / name)
    return folder
