"""A rotated model as files: libllama with the online transform gives what the plain model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from mbq_gguf.formats.gguf_types import import_gguf
from rich.console import Console

# Q8_0 rounds weights by 1/256 of each block's largest; another basis makes other errors of the same size.
TIMES = 3.0


def write(model: Path, folder: Path, name: str, **options: Any) -> ConvertOptions:
    chosen = ConvertOptions(model, folder / f"{name}.gguf", method="rtn", rounding="nearest", mmproj_type="F32", **options)
    convert(chosen, Console(quiet=True))
    return chosen


def logits(text: Path, mmproj: Path) -> Floats:
    question = load_questions(SHIPPED)[0]
    with Model(text, mmproj, context=512) as model:
        image = model.vision.encode(question.image)
        return model.logits(model.prompt(question.question), [image], model.tokenize("three or four"))


@pytest.mark.usefixtures("built_llama")
def test_rotated_files_give_the_plain_logits(tiny_dir: Path, tmp_path: Path) -> None:
    plain = write(tiny_dir, tmp_path, "plain", type="BF16")
    rounded = write(tiny_dir, tmp_path, "rounded", type="Q8_0")
    expected = logits(plain.out, plain.mmproj)
    bound = TIMES * float(np.abs(logits(rounded.out, rounded.mmproj) - expected).max())
    assert bound < 0.5 * float(np.abs(expected).max())  # or nothing below would mean anything
    for rotate in ("offline", "full"):
        turned = write(tiny_dir, tmp_path, rotate, type="Q8_0", rotate=rotate)
        assert float(np.abs(logits(turned.out, turned.mmproj) - expected).max()) < bound
        # With the plain projector the image arrives in the wrong basis.
        assert float(np.abs(logits(turned.out, plain.mmproj) - expected).max()) > bound
        fields = import_gguf().GGUFReader(turned.out).fields
        assert fields["mbq.rotate"].contents() == rotate
        assert ("mbq.hadamard.ffn_down" in fields) == (rotate == "full")
