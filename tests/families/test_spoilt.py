"""Corrupted files of families that are read as another: each fault is reported with its place, before weights are read.

Settings and tokenizers that every family shares are in tests/test_bad_input.py. Costs about four seconds of processor time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.models import as_llama, checks
from mbq_gguf.models.load import check_source
from mbq_gguf.models.published import TEXT_MODELS
from mbq_gguf.models.tokenizer import Pieces
from published import ADDED, FIRST, pieces_alone
from text_models import PUBLISHED
from tokens import spaced

COUNTS = {
    "Qwen-VL": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "seq_length", "layer_norm_epsilon"),
    "GLM-4V": ("hidden_size", "ffn_hidden_size", "multi_query_group_num", "num_layers", "padded_vocab_size", "rope_ratio"),
    "CogVLM2": ("hidden_size", "intermediate_size", "num_multi_query_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps"),
}


def settings(name: str) -> dict[str, Any]:
    return {**PUBLISHED[name].config, "vocab_size": 500, "padded_vocab_size": 500}


@pytest.mark.parametrize("value", [None, 0, -1, "x", True, [1], 2**31])
@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, several in COUNTS.items() for setting in several])
def test_a_setting_that_is_no_number_is_named(name: str, setting: str, value: Any) -> None:
    found = settings(name)
    text_model = TEXT_MODELS[found["architectures"][0]]
    text_model(found)
    with pytest.raises(UserError, match=f"{setting} in the model's config.json is .* above 0 that a model has: download the model again"):
        text_model({**found, setting: value})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_key_value_heads": None}, "num_key_value_heads in the model's config.json is None"),
        ({"intermediate_size": 0}, "intermediate_size in the model's config.json is 0"),
        ({"num_key_value_heads": 3}, "128 channels, 8 heads and 3 key heads"),
    ],
)
def test_sizes_of_what_is_read_as_a_llama_are_checked(change: dict[str, Any], why: str) -> None:
    sizes = {"vocab_size": 500, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 512}
    text = {**sizes, "model_type": "internlm2", "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    as_llama.check({"llm_config": text})
    with pytest.raises(UserError, match=why):
        as_llama.check({"llm_config": text | change})


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("value", [0, "x", [1.0]])
def test_factors_for_other_pairs_than_a_head_s_are_named(name: str, value: Any) -> None:
    scales = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    text = {"model_type": "phi3", "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
    text |= {"original_max_position_embeddings": 128, "rope_theta": 10000.0}
    as_llama.settings({**text, "rope_scaling": scales})
    with pytest.raises(UserError, match=f"{name} in the model's config.json is not a list of 16 factors"):
        as_llama.settings({**text, "rope_scaling": scales | {name: value}})


@pytest.mark.parametrize(("name", "groups"), [("GLM-4V", "multi_query_group_num"), ("CogVLM2", "num_multi_query_heads")])
def test_heads_that_do_not_divide_are_refused(name: str, groups: str) -> None:
    found = settings(name)
    with pytest.raises(UserError, match="128 channels, 4 heads and 3 key heads, which do not divide"):
        TEXT_MODELS[found["architectures"][0]]({**found, groups: 3})


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("rows", [(), (383, 128), (0, 128)])
def test_queries_keys_and_values_of_another_shape_are_named(name: str, rows: tuple[int, ...]) -> None:
    found, graph = settings(name), PUBLISHED[name].graph
    tensor = f"{graph.layer.format(1)}{graph.qkv}.weight"
    with pytest.raises(UserError, match=rf"{tensor} is \({rows[0] if rows else ''}.*rows: download the model again"):
        TEXT_MODELS[found["architectures"][0]](found).parts_of(tensor, torch.zeros(rows))


@pytest.mark.parametrize("name", ["model.layers.1.attention.wqkv.weight", "model.layers.1.self_attn.qkv_proj.weight"])
@pytest.mark.parametrize("rows", [(), (191, 128), (0, 128)])
def test_merged_matrices_of_another_shape_are_named(name: str, rows: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"{name} is .* its rows are not a multiple of 12, as config.json asks"):
        as_llama.parts_of(name, torch.zeros(rows), 8, 2)


def test_more_layers_or_experts_than_llama_cpp_has_room_for_are_refused_at_once(tmp_path: Path) -> None:
    nested = [{"llm_config": {"num_hidden_layers": checks.MAX_LAYERS + 1}}, {"vision_config": {"depth": 10**9}}]
    nested += [{"text_config": {"num_experts": checks.MAX_EXPERTS + 1}}]
    for spoilt in ({"num_layers": 10**9}, {"merger_times": 10**9}, *nested):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["InternVLChatModel"], "vision_config": {"a": 1}} | spoilt))
        with pytest.raises(
            UsageError, match=r"(layers|depth|merger_times|experts) in the model's config.json is \d+ and llama.cpp supports \d+:"
        ):
            check_source(tmp_path)


@pytest.mark.parametrize("size", [[224, 224, 3], 13, [224, 13], 10**9])
def test_pictures_of_no_patch_or_of_too_many_are_refused(tmp_path: Path, size: Any) -> None:
    sound = {"architectures": ["InternVLChatModel"], "vision_config": {"image_size": size, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(sound))
    with pytest.raises(UserError, match=r"image_size in the model's config.json is .* no height and width from a patch to 65536 pixels"):
        check_source(tmp_path)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A directory with tokenizer.model and the settings beside it."""
    spaced((), tmp_path)
    for name in ("chat_template.jinja", "generation_config.json"):
        (tmp_path / name).touch()
    pieces_alone(tmp_path, FIRST, ADDED, (), {"tokenizer_class": "InternLM2Tokenizer"}, space=True)
    Pieces.of(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [None, b"", b"\x00\x01\x02", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_tokenizer_that_is_none_is_named(pieces: Path, content: bytes | None) -> None:
    file = pieces / "tokenizer.model"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.model is not a SentencePiece tokenizer \(.*download it again"):
        Pieces.of(pieces)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"unk_token": None}, "names a bos_token, eos_token or unk_token that"),
        ({"bos_token": "<never>"}, "names a bos_token, eos_token or unk_token that"),
        ({"bos_token": {}}, "lacks settings of a tokenizer"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "lacks settings of a tokenizer"),
        ({"added_tokens_decoder": {"3": {}}}, "lacks settings of a tokenizer"),
        ({"added_tokens_decoder": [1]}, "lacks settings of a tokenizer"),
    ],
)
def test_settings_that_do_not_fit_the_tokenizer_are_named(pieces: Path, change: dict[str, Any], why: str) -> None:
    file = pieces / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"tokenizer_config.json {why}"):
        Pieces.of(pieces)
