"""Prompts from chat templates: strings for templates that accept them, typed parts for others."""

from __future__ import annotations

import pytest
from mbq_cbind.chat import ChatTemplate
from mbq_cbind.errors import BindingError

STRING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PART = "{% if c.type == 'text' %}[{{ c.text }}]{% endif %}"
TYPED = "{{ bos_token }}{% for m in messages %}{% for c in m.content %}" + PART + "{% endfor %}{% endfor %}"


def test_images_come_first_and_nothing_stands_between() -> None:
    assert ChatTemplate(STRING).prompt("What?", marker="<M>", images=2) == "<user><M><M>What?</s>\n<assistant>"


def test_templates_that_take_only_typed_parts() -> None:
    assert ChatTemplate(TYPED).prompt("What?", marker="<M>", images=1) == "[<M>What?]"


def test_a_leading_bos_is_left_to_the_tokeniser() -> None:
    assert ChatTemplate(TYPED, bos="<s>").prompt("What?") == "[What?]"


def test_block_lines_leave_no_white_space() -> None:
    template = "  {% for m in messages %}\n  {{- m.content }}\n  {% endfor %}\nend"
    assert ChatTemplate(template).prompt("What?") == "What?\nend"


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{% if %}", "{{ messages[0].content.nothing.at_all }}"])
def test_templates_that_fail(template: str) -> None:
    with pytest.raises(BindingError, match="cannot be rendered"):
        ChatTemplate(template).prompt("What?")


def test_templates_that_drop_the_question() -> None:
    with pytest.raises(BindingError, match="drops the user's words"):
        ChatTemplate("hello").prompt("What?")


def test_what_ends_an_answer() -> None:
    assert ChatTemplate(STRING).end_of_answer() == "</s>\n"
    assert ChatTemplate(TYPED).end_of_answer() == "]"
