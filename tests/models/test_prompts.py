"""Prompts: the chat template's own text, the image first, and which tokens belong to the answer."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mbq_gguf.calibration.dataset import SHIPPED
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.prompts import RuntimePrompt

IMAGE = SHIPPED.parent / "images" / "0000.png"
PROMPT = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>What color?<|im_end|>\n<|im_start|>assistant\n"


def text(tiny: LoadedModel, ids: torch.Tensor) -> str:
    return str(tiny.prompts.tokenizer.decode(ids))


def test_prompt_and_answer(tiny: LoadedModel) -> None:
    encoded = tiny.encode(IMAGE, [("What color?", "dark blue")])
    assert text(tiny, encoded.ids) == PROMPT + "dark blue<|im_end|>"
    assert text(tiny, encoded.ids[encoded.answer]) == "dark blue<|im_end|>"
    assert int(encoded.vision.sum()) == 64  # 224 x 224 in patches of 14, merged 2 x 2
    assert encoded.inputs["pixel_values"].shape == (256, 1176)
    assert encoded.inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert torch.equal(encoded.inputs["mm_token_type_ids"][0].bool(), encoded.vision)


def test_open_prompt(tiny: LoadedModel) -> None:
    encoded = tiny.encode(IMAGE, [("What color?", "")])
    assert text(tiny, encoded.ids) == PROMPT
    assert not encoded.answer.any()


def test_later_turns_are_prompt_then_answer(tiny: LoadedModel) -> None:
    encoded = tiny.encode(IMAGE, [("What color?", "blue"), ("Where?", "top left")])
    assert (
        text(tiny, encoded.ids) == PROMPT + "blue<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>"
    )
    assert text(tiny, encoded.ids[encoded.answer]) == "blue<|im_end|>top left<|im_end|>"


def test_which_tokens_count_as_the_answer(tiny: LoadedModel) -> None:
    encoded = tiny.encode(IMAGE, [("What color?", "blue"), ("Where?", "top left")])
    header = "<|im_start|>assistant\n"
    found = {mask: text(tiny, encoded.ids[encoded.counted(mask)]) for mask in ("answer", "header", "predicting")}
    assert found == {
        "answer": "blue<|im_end|>top left<|im_end|>",
        "header": f"{header}blue<|im_end|>{header}top left<|im_end|>",
        "predicting": "\nblue\ntop left",
    }


def test_what_has_no_answer_has_no_header(tiny: LoadedModel) -> None:
    encoded = tiny.encode(IMAGE, [("What color?", "blue"), ("Where?", "")])
    assert text(tiny, encoded.ids[encoded.header]) == "<|im_start|>assistant\n"
    assert not tiny.encode(IMAGE, [("What color?", "")]).header.any()


SAID = "{% for part in m.content %}{{ '<|image_pad|>' if part.type == 'image' else part.text }}{% endfor %}"
# How other families open an answer, and what of it counts: LLaVA-1.5, Mistral (nothing is written, the question's end opens it), Gemma.
FORMS = {
    " ASSISTANT:": "{% for m in messages %}{% if m.role == 'user' %}USER: SAID{% else %} ASSISTANT:SAID<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}",
    "]": "{% for m in messages %}{% if m.role == 'user' %}[INST]SAID[/INST]{% else %}SAID<|im_end|>{% endif %}{% endfor %}",
    "<start>model\n": "{% for m in messages %}<start>{{ m.role.replace('assistant', 'model') }}\nSAID<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}",
}


@pytest.mark.parametrize("opening", FORMS)
def test_the_header_is_found_by_the_template(tiny: LoadedModel, opening: str) -> None:
    prompt = copy.copy(tiny.prompts.image_prompt)
    assert isinstance(prompt, RuntimePrompt)
    prompt.template = copy.deepcopy(tiny.prompts.tokenizer)
    prompt.template.chat_template = FORMS[opening].replace("SAID", SAID)
    encoded = replace(tiny.prompts, image_prompt=prompt).encode(IMAGE, [("What color?", "blue"), ("Where?", "left")])
    assert text(tiny, encoded.ids[encoded.header]) == opening * 2
    assert "blue<|im_end|>" in text(tiny, encoded.ids[encoded.answer])


def test_image_that_cannot_be_read(tiny: LoadedModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(IMAGE.read_bytes()[:200])
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        tiny.encode(broken, [("What color?", "blue")])
    with pytest.raises(UserError, match=r"none\.png cannot be read"):
        tiny.encode(tmp_path / "none.png", [("What color?", "blue")])
