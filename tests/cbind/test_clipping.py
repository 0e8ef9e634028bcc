"""The count of values that static ranges clip, taken in the running graph, against the activations themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.clipping import Clipping
from mbq_cbind.model import Model
from static_files import LAYERS, WORDS, decode, keys, picture, rows

EVERYTHING, NOTHING = 1e-20, 1e20  # ranges that cut all values, and none


def ranges(site: str, layer: int, text: float, vision: float) -> dict[str, Any]:
    """Ranges of one site of one layer; every other one is dynamic."""
    found = keys(0.0, 0.0, positions=[0])
    for kind, value in (("text", text), ("vision", vision)):
        found[f"mbq.act.range.{site}.{kind}"] = [value if i == layer else 0.0 for i in range(LAYERS)]
    return found


def test_shares_are_those_of_the_activations(static_file: Any, large_mmproj: Path, tmp_path: Path) -> None:
    """Text and a picture in one pass; the first row is a sink's."""
    clipping, seen = Clipping(), []
    path = static_file(ranges("qkv", 0, 0.5, 0.25))
    with Model(path, large_mmproj, context=512, threads=1, aifs=True, observe={"attn_norm-0": seen.append}, clipping=clipping) as model:
        image = model.vision.encode(picture(tmp_path, 224))
        prompt, answer = model.prompt("What is " + WORDS), model.tokenize(" It is")
        tokens = [*model.prompt_tokens(prompt, [image]), *answer[:-1]]
        model.logits(prompt, [image], answer)
    (x,), text = seen, np.array([token is not None for token in tokens])
    assert len(x) == len(tokens)
    text[0] = False
    vision = np.array([token is None for token in tokens])
    expected = {"text": float(np.mean(np.abs(x[text]) > 0.5)), "vision": float(np.mean(np.abs(x[vision]) > 0.25))}
    assert clipping.shares() == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected["text"] < expected["vision"] < 0.95
    assert clipping.shares() == {}


def test_an_activation_counts_once_and_rows_that_are_put_out_alone(static_file: Any) -> None:
    """Three matrices read qkv's and one o's; behind the last attention 70 of 80 rows are left."""
    of_two = ranges("qkv", 0, EVERYTHING, 0.0) | {"mbq.act.range.o.text": [NOTHING, 0.0, 0.0]}
    for metadata, expected in (
        (of_two, 0.5),
        (of_two | {"mbq.act.range.gate_up.text": [0.0, 0.0, EVERYTHING]}, (79 + 69) / (79 + 79 + 69)),
    ):
        clipping = Clipping()
        with Model(static_file(metadata), context=128, threads=1, clipping=clipping) as model:
            decode(model, rows(model, 80, range(70)))
        assert clipping.shares() == {"text": pytest.approx(expected)}


def test_counting_changes_no_bit_and_few_rows_have_no_range(static_file: Any) -> None:
    found = []
    for clipping in (None, Clipping()):
        with Model(static_file(keys()), context=256, threads=1, clipping=clipping) as model:
            found.append(decode(model, rows(model, 80, [79])))
            if clipping:
                assert set(clipping.shares()) == {"text"}
            decode(model, rows(model, 64, [63], start=80))
            assert not clipping or clipping.shares() == {}
    assert np.array_equal(*found)
