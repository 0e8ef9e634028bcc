"""After a failure: the settings of config.json that are probably at fault are named, and nothing else is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.models.suspects import describe_failure, suspects
from transformers import AutoConfig

UNKNOWN = {  # transformers has no class of it
    "model_type": "internvl_chat",
    "llm_config": {"num_hidden_layers": 2, "hidden_size": 64, "rope_scaling": {"factors": [1.0, 1.1]}},
    "vision_config": {"num_hidden_layers": 2},
}


def sound(name: str) -> dict[str, Any]:
    """The settings that a model of class ``name`` has by itself."""
    if name == UNKNOWN["model_type"]:
        return copy.deepcopy(UNKNOWN)
    found: dict[str, Any] = json.loads(AutoConfig.for_model(name).to_json_string(use_diff=False))
    return found


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe", "gemma3", "llava_next", "llama4", "smolvlm", "internvl", "internvl_chat"])
def test_sound_settings_are_not_suspected(name: str) -> None:
    assert list(suspects(sound(name))) == []


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        ("qwen3_vl_moe", "text_config.num_local_experts", None, "is None and usually a number"),
        ("gemma3", "text_config.sliding_window", {"a": 1}, "is {'a': 1} and usually a number"),
        ("gemma3", "text_config.rope_parameters.sliding_attention", {}, "is {} and usually an object"),
        ("qwen3_vl_moe", "vision_config.deepstack_visual_indexes", [], "is [] and usually a list of numbers"),
        ("gemma3", "text_config.layer_types", ["x", 3], "is ['x', 3] and usually a list of words"),
        ("llava_next", "image_grid_pinpoints", [[64, 64], None], "is [[64, 64], None] and usually a list of lists of numbers"),
        ("llava_next", "image_grid_pinpoints", [[64, 64], [64]], "is a list of lists of numbers, not all of one kind and length"),
        (
            "internvl_chat",
            "llm_config.rope_scaling.short_factor",
            [1, "x"],
            "is a list of numbers and words, not all of one kind and length",
        ),
        ("internvl_chat", "llm_config.head_dim", None, "is None"),
        ("internvl_chat", "llm_config", {"hidden_size": 64}, "has no number of layers"),
        ("internvl_chat", "vision_config", None, "is None"),
    ],
)
def test_what_is_odd_is_named(name: str, place: str, value: Any, words: str) -> None:
    settings = holder = sound(name)
    *parts, last = place.split(".")
    for part in parts:
        holder = holder[part]
    holder[last] = value
    assert list(suspects(settings)) == [f"{place} {words}"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("'NoneType' object is not iterable"), "in config.json llm_config.head_dim is None"),
        (ValueError("not enough values to unpack (expected 2, got 1)"), "in config.json llm_config.head_dim is None"),
        (ValueError("hidden_size must be a multiple of 4"), "hidden_size must be a multiple of 4"),
        (KeyError("depth"), "depth is missing"),
    ],
)
def test_only_python_s_own_words_are_replaced(tmp_path: Path, error: Exception, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNKNOWN | {"llm_config": {"head_dim": None, "depth": 1}}))
    assert describe_failure(error, tmp_path) == words


def test_a_null_that_is_usual_is_named_where_none_is_what_failed(tmp_path: Path) -> None:
    settings = sound("gemma4") | {"vision_config": sound("gemma4_vision")}
    assert list(suspects(settings)) == []
    assert settings["text_config"]["num_experts"] is None
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "text_config.num_experts is None" in describe_failure(TypeError("found element of type NoneType"), tmp_path)
    assert describe_failure(TypeError("a reason"), tmp_path) == "a reason"


def test_without_suspects_python_s_words_remain(tmp_path: Path) -> None:
    assert describe_failure(TypeError("a reason"), tmp_path) == "a reason"
    (tmp_path / "config.json").write_text(json.dumps(UNKNOWN))
    assert describe_failure(TypeError("a reason"), tmp_path) == "a reason"


@pytest.mark.parametrize("spoilt", [{"text_config": {"model_type": "nougat", "depth": 1}}, {"deep": []}], ids=["class", "deep"])
def test_what_cannot_be_looked_at_hides_no_error(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    """A class of transformers that has no settings by itself, and lists in lists."""
    text = json.dumps(spoilt).replace("[]", "[" * 400 + "]" * 400)
    (tmp_path / "config.json").write_text(text)
    assert describe_failure(TypeError("a reason"), tmp_path) == "a reason"
