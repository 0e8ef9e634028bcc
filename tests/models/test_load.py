"""Valid and invalid model directories: each fault has its own message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.layouts import STANDARD
from safetensors.torch import load_file, save_file


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny VLM to damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, edit: object) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)  # type: ignore[operator]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_loaded(tiny: LoadedModel) -> None:
    assert tiny.architecture == "Qwen2VLForConditionalGeneration"
    assert tiny.decoder.path == "model.language_model"
    assert tiny.tied
    names = [name for name, _ in tiny.decoder.linears()]
    assert len(names) == 3 * len(STANDARD.readers)
    assert names[0] == "layers.0.self_attn.q_proj"
    assert next(tiny.decoder.layers.parameters()).dtype == torch.bfloat16  # as stored
    assert tiny.decoder.norm.weight.dtype == torch.float32  # the rest computes in float32
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        load(tmp_path / "nothing")


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(tmp_path)


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        load(copy)


def test_unsupported_architecture_names_the_supported(copy: Path) -> None:
    edit_config(copy, architectures=["NovelForConditionalGeneration"], model_type="novel_vl")
    with pytest.raises(UsageError, match=r"NovelForConditionalGeneration is not supported: use a model of a family that"):
        load(copy)


def test_text_only_model(copy: Path) -> None:
    edit_config(copy, architectures=["Qwen2ForCausalLM"], model_type="qwen2", vision_config=None)
    with pytest.raises(UsageError, match="Qwen2ForCausalLM is a text-only model"):
        load(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors files"):
        load(copy)


def test_truncated_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        load(copy)


def test_missing_shard(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{1 + (n > 9)}-of-00002.safetensors" for n, name in enumerate(tensors)}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(copy)


def test_missing_tensor(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop(next(name for name in tensors if "layers.1.mlp.up_proj" in name)))
    with pytest.raises(UserError, match=r"lacks 1 weights, .*up_proj"):
        load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(copy: Path, value: float) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        next(v for k, v in tensors.items() if "2.self_attn.k_proj.weight" in k)[3, 5] = value

    edit_weights(copy, damage)
    with pytest.raises(UserError, match=r"k_proj\.weight in .* has NaN or infinite values"):
        load(copy)


def test_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load(copy)


def test_missing_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(copy)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no pictures') }}",
        "{{ messages.x.y }}",
    ],
    ids=["syntax", "division", "recursion", "raises", "attribute"],
)
def test_a_chat_template_that_raises(template: str, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="the model's chat template cannot be rendered"):
        load(copy)


def test_layers_of_another_kind_are_told(tiny: LoadedModel) -> None:
    layer = tiny.decoder.layers[0]
    assert STANDARD.fault(layer) is None
    layer.pre_feedforward_layernorm = torch.nn.LayerNorm(4)
    assert STANDARD.fault(layer) == "has a norm pre_feedforward_layernorm that no layout describes"
    del layer.pre_feedforward_layernorm
    assert STANDARD.fault(torch.nn.Linear(2, 2)) == "has no linear self_attn.q_proj"
