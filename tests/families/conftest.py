"""One small model per family, made once for all of its tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mbq_gguf.export.conversion import load_package
from recipes import RECIPES
from small import Small


@pytest.fixture(scope="session", autouse=True)
def _named_tokenizer(built_llama: Path) -> Iterator[None]:
    """The conversion package knows a tokenizer by what it makes of a text; the small vocabulary's splits words as its large one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_package().conversion.TextModel, "get_vocab_base_pre", lambda *_: "smollm")
        yield


LIKE_OTHERS = (
    "Qwen2.5-VL",
    "Idefics3",
    "InternVL 3 (-hf)",
    "InternVL 2 (Phi-3)",
    "Pixtral",
    "GLM-OCR",
    "Qwen3.5-MoE",
    "Gemma 4",
    "Gemma 4 (experts)",
    "MiniCPM-V 4.5",
)  # the same code as a neighbour's; the suite has a minute for all families


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in RECIPES])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(request.param, tmp_path_factory.mktemp("family"))
