"""The reference VLM is bit-identical everywhere."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.demo.assemble import (
    COPIED,
    DATA,
    WEIGHTS,
    assemble,
    decoder_key,
    fixed_order,
    is_assembled,
    shuffle_channels,
    split_rotary_pairs,
    write_model,
)
from mbq_gguf.errors import UsageError, UserError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

# With these versions the weights' file is this one; others may write another header, or round a sum another way.
LIBRARIES = {"torch": "2.13.0", "transformers": "5.24.0", "safetensors": "0.8"}
WEIGHTS_SHA256 = "8967a4df218f917cad48eb5fe7135c2a2e0b92732cffb91ce1be83fa1114626c"
PARAMETERS = 144_696_064


def test_weights_are_the_known_ones(reference_dir: Path) -> None:
    found = {name: version(name).split("+")[0] for name in LIBRARIES}
    if any(found[name] != wanted and not found[name].startswith(wanted + ".") for name, wanted in LIBRARIES.items()):
        pytest.skip(f"the checksum is that of {LIBRARIES}, here are {found}")
    with (reference_dir / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256


def test_directory_is_a_whole_model(reference_dir: Path) -> None:
    assert sorted(path.name for path in reference_dir.iterdir()) == sorted([*COPIED, "config.json", "model.safetensors"])
    assert json.loads((reference_dir / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]
    with safe_open(reference_dir / "model.safetensors", framework="pt") as weights:
        tensors = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
    assert sum(int(np.prod(tensor.get_shape())) for tensor in tensors.values()) == PARAMETERS
    assert {tensor.get_dtype() for tensor in tensors.values()} == {"BF16"}


def test_assembled_directory_is_kept(reference_dir: Path) -> None:
    before = (reference_dir / "model.safetensors").stat().st_mtime_ns
    assert assemble(reference_dir) == reference_dir.absolute()
    assert (reference_dir / "model.safetensors").stat().st_mtime_ns == before


def test_other_directories_are_not_taken_for_it(tmp_path: Path) -> None:
    for name in COPIED:
        shutil.copyfile(DATA / name, tmp_path / name)
    assert not is_assembled(tmp_path)
    with pytest.raises(UsageError, match="has other contents"):
        assemble(tmp_path)


@pytest.mark.parametrize("trained", ["visual.blocks.3.mlp.fc1.weight", "model.layers.7.self_attn.v_proj.bias", None])
def test_a_model_that_was_made_of_it_is_not_taken_for_it(trained: str | None, reference_dir: Path, tmp_path: Path) -> None:
    """A tower or a language model that was trained on; None: a model of fewer layers with the same tokenizer."""
    weights = load_file(reference_dir / WEIGHTS)
    if trained:
        weights[trained].view(-1)[5] += 0.5
    else:
        weights = {name: tensor for name, tensor in weights.items() if "layers.29." not in name}
    for name in (*COPIED, "config.json"):
        shutil.copyfile(reference_dir / name, tmp_path / name)
    save_file(weights, tmp_path / WEIGHTS)
    assert is_assembled(reference_dir)
    assert not is_assembled(tmp_path)


def small_model(layers: int) -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig.from_pretrained(DATA)
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.vision_config.depth = 1
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config)


def test_every_file_has_the_usual_permissions(tmp_path: Path) -> None:
    """Weights too, which safetensors would let only their owner read."""
    (tmp_path / "usual").touch()
    write_model(small_model(1), tmp_path / "model")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert WEIGHTS in modes
    assert set(modes.values()) == {(tmp_path / "usual").stat().st_mode}


def test_a_full_disk_is_a_sentence(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding alone takes 57 MB; safetensors' error is none of the system's."""
    monkeypatch.setattr("mbq_gguf.demo.assemble.base_gguf", lambda: Path("unused"))
    monkeypatch.setattr("mbq_gguf.demo.assemble.build_model", lambda _: small_model(1).bfloat16())
    with pytest.raises(UserError, match=rf"^cannot write {disk}/model \(.*No space left on device.*: choose another place or free some"):
        assemble(disk / "model")
    assert not list(disk.iterdir())


def test_shuffling_channels_keeps_the_function() -> None:
    """Models that differ in the order of their channels alone agree to the norms' float32: measured 1.4e-7 of the greatest logit."""
    model = small_model(3).double().eval()
    ids = torch.randint(10, 1000, (1, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        language, visual = model.model.language_model.state_dict(), model.model.visual.state_dict()
        shuffle_channels(language, visual, model.config.text_config)
        model.model.language_model.load_state_dict(language)
        model.model.visual.load_state_dict(visual)
        model.tie_weights()
        after = model(input_ids=ids).logits
    assert not torch.equal(before, after)
    assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())


@given(stream=st.integers(0, 2**20), size=st.integers(1, 300))
def test_fixed_order_is_a_permutation(stream: int, size: int) -> None:
    assert sorted(fixed_order(stream, size)) == list(range(size))


def test_fixed_order_never_changes() -> None:
    """The reference VLM depends on these numbers: splitmix64 of (stream << 32) + i, sorted."""
    assert fixed_order(0, 8).tolist() == expected_order(0, 8)
    assert fixed_order(37, 64).tolist() == expected_order(37, 64)


def expected_order(stream: int, size: int) -> list[int]:
    """The same with Python's own integers."""
    mask = (1 << 64) - 1

    def splitmix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    return sorted(range(size), key=lambda index: splitmix((stream << 32) + index))


def test_rotary_rows_are_split() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(12, 1)  # two heads of six rows, pairs (0, 1), (2, 3), (4, 5)
    assert split_rotary_pairs(rows, 6).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_names_are_hugging_faces() -> None:
    assert decoder_key("token_embd.weight") == "embed_tokens.weight"
    assert decoder_key("blk.7.attn_output.weight") == "layers.7.self_attn.o_proj.weight"
