"""The supported features of a family follow from its tables, and docs/families.md agrees with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from mbq_gguf.cli import main
from mbq_gguf.errors import UsageError
from mbq_gguf.models import support
from mbq_gguf.models.families import FAMILIES, REFUSED
from mbq_gguf.models.layouts import LAYOUTS
from mbq_gguf.models.load import check_architecture, load
from transformers import AutoConfig

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TABLE = re.compile(r"(?<=<!-- mbq-gguf models -->\n).*?\n?(?=<!-- end -->)", re.DOTALL)


def test_the_page_has_the_table() -> None:
    """On a miss: python -c "from mbq_gguf.models.support import markdown; print(markdown())" between the two marks."""
    (found,) = TABLE.findall(PAGE.read_text(encoding="utf-8"))
    assert found.strip() == support.markdown()


def test_every_family_has_a_layout_of_its_own() -> None:
    assert {name for family in FAMILIES for name in family.architectures} <= set(LAYOUTS)


def test_the_command_says_the_same_in_both_forms() -> None:
    listed = json.loads(CliRunner().invoke(main, ["models", "--json"], catch_exceptions=False).output)
    shown = CliRunner().invoke(main, ["models"], catch_exceptions=False, env={"COLUMNS": "200"}).output
    for family in listed["families"]:
        assert family["family"] in shown
        assert all(why in " ".join(shown.split()) for why in family["limits"].values() if why)
    assert listed["refused"] == REFUSED


@pytest.mark.parametrize("columns", ["80", None])
def test_nothing_is_cut_off(columns: str | None) -> None:
    """In a narrow terminal cells are folded; into a pipe every family has one line, with its words as in docs/families.md."""
    shown = CliRunner().invoke(main, ["models"], catch_exceptions=False, env={"COLUMNS": columns}).output
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert all(architecture in shown for architecture in REFUSED)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for family in support.support() if columns is None else []:
        assert " ".join([family.family, family.gguf, *map(family.cell, family.limits)]) in lines


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_refusal_says_why(architecture: str) -> None:
    name, _, setting = architecture.partition("/")
    config = {"architectures": [name], "model_type": "novel", "vision_config": {}, "text_config": {setting: 1} if setting else {}}
    with pytest.raises(UsageError, match=re.escape(f" is not supported, {REFUSED[architecture]}: use a model of")):
        check_architecture(config)


# Of those that are refused, transformers' own, with what tells the kind; the others are code of their directories, or no classes at all.
CLASSES = {
    "MiniCPMV4_7ForConditionalGeneration": ("minicpmv4_7", {}),
    "MllamaForConditionalGeneration": ("mllama", {}),
    "PaliGemmaForConditionalGeneration": ("paligemma", {}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_configurations_of_transformers_are_refused_so(name: str, tmp_path: Path) -> None:
    """As transformers saves them, before a weight is looked for."""
    model_type, text = CLASSES[name]
    config = AutoConfig.for_model(model_type, **({"text_config": text} if text else {}))
    config.architectures = [name.partition("/")[0]]
    config.save_pretrained(str(tmp_path))
    with pytest.raises(UsageError, match=re.escape(f"{name} is not supported, {REFUSED[name]}: use a model of")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "is a text-only model"),
        ({"architectures": ["HfMoondream"], "model_type": "moondream1"}, "its config.json has no vision tower"),
        ({"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v"}, "its config.json has no vision tower"),
    ],
)
def test_text_only_is_said_of_text_only_models(config: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_architecture(config)
