"""Models that several tests share: a small random Qwen2-VL (real code paths in a second), the reference VLM, and the built llama.cpp."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mbq_gguf.calibration.dataset import SHIPPED, Sample, read_jsonl
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel, load

DEMO = Path(__file__).parents[1] / "converter" / "mbq_gguf" / "demo" / "data"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json")
LAYERS = 3


def write_tiny_vlm(directory: Path, seed: int = 0) -> Path:
    """Save a Qwen2-VL of 3 layers, width 128, 4 heads over 2 key/value heads, feed-forward 192, in bfloat16, tied embeddings."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(DEMO))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 192, LAYERS
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.layer_types = text.layer_types[:LAYERS]
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    # llama.cpp's conversion takes the 2 in merger.mlp.2 for a layer's number: three layers are the least that it converts.
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = 3, 32, 2, 128
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms and biases, so that folding into them shows; larger linears, so that layers matter beside the residual.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "layers" in name:
                parameter.mul_(4)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(str(directory))
    for file in PROCESSOR_FILES:
        shutil.copy(DEMO / file, directory / file)
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved tiny VLM; read only."""
    return write_tiny_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> LoadedModel:
    """The tiny VLM, loaded; nothing that takes it changes it."""
    return load(tiny_dir)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Four scenes of the shipped calibration set with two turns each."""
    return [Sample(s.image, s.turns[:2]) for s in read_jsonl(SHIPPED)[:4]]


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The reference VLM as a Hugging Face directory in the user's cache (290 MB, made once); read only."""
    from mbq_gguf.demo.assemble import assemble
    from mbq_gguf.llama_cpp.cache import cache_root

    return assemble(cache_root() / "demo" / "reference-vlm")


@pytest.fixture(scope="session")
def built_llama() -> Path:
    """The tree of the built llama.cpp; the test is skipped where nothing is built."""
    from mbq_gguf.llama_cpp.bindings import bind
    from mbq_gguf.llama_cpp.paths import source_dir

    try:
        bind()
        return source_dir()
    except UserError as error:
        pytest.skip(str(error))
