"""Static ranges in a whole model: every row uses the range of its class, and the class of every single row matters.

The ranges that llama.cpp's graph picks are observed as it computes them. The file's differ by a factor of 1000 from class to class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from static_files import DYNAMIC, LEAST, TEXT, VISION, WORDS, Seen, Settled, decode, keys, picture, rows


@pytest.fixture
def model(static_file: Any, seen: Seen) -> Iterator[Model]:
    with Model(static_file(keys(positions=[0])), context=512, batch=256, threads=1, observe=seen.watch) as opened:
        yield opened


@pytest.mark.parametrize("wanted", [[], [79], list(range(70)), list(range(80))], ids=["none", "one", "some", "all"])
def test_text_and_what_is_put_out(wanted: list[int], model: Model, seen: Seen) -> None:
    decode(model, rows(model, 80, wanted))
    assert seen.classes() == [[DYNAMIC] + 79 * [TEXT]]
    gathered = LEAST <= len(wanted) < 80
    assert len(seen.out) == gathered
    if gathered:
        assert np.array_equal(seen.out[0], seen.rows[0][wanted])


def test_few_rows_are_dynamic(model: Model, seen: Seen) -> None:
    decode(model, rows(model, LEAST - 1))
    assert seen.rows == []
    decode(model, rows(model, LEAST, start=LEAST - 1))
    assert seen.classes() == [LEAST * [TEXT]]  # behind the beginning no position is a sink's


def test_graphs_that_are_used_again_have_new_classes(model: Model, seen: Seen) -> None:
    for start in (0, 80, 160):
        decode(model, rows(model, 80, start=start))
    assert seen.classes() == [[DYNAMIC] + 79 * [TEXT], 80 * [TEXT], 80 * [TEXT]]


def test_embeddings_of_a_caller_are_dynamic(model: Model, seen: Seen) -> None:
    decode(model, [(0, i, 0, False) for i in range(80)], np.full((80, 128), 0.1, np.float32))
    assert seen.classes() == [80 * [DYNAMIC]]


def test_a_sink_by_its_token(static_file: Any, seen: Seen) -> None:
    with Model(static_file(keys()), context=512, threads=1) as plain:
        tokens = plain.tokenize(WORDS)[:80]
    sinks = sorted({tokens[3], tokens[10]})
    with Model(static_file(keys(tokens=sinks)), context=512, threads=1, observe=seen.watch) as model:
        decode(model, rows(model, 80))
    assert seen.classes() == [[DYNAMIC if token in sinks else TEXT for token in tokens]]


@pytest.mark.parametrize("reorder", [False, True])
def test_a_mixed_batch_of_two_sequences(reorder: bool, static_file: Any, seen: Seen) -> None:
    """Tokens, a picture's rows and other embeddings in one micro-batch, in any order; each sequence begins with a sink."""

    def two(_c: Any, parameters: Any) -> None:
        parameters.n_seq_max = 2

    with Settled(static_file(keys(positions=[0])), settle=two, context=512, threads=1, observe=seen.watch) as model:
        expected = decode_mixed(model, reorder)
    assert seen.classes() == [[*computed(expected[:50], reorder), *computed(expected[50:], reorder)]]
    assert not reorder or seen.classes() != [expected]


def computed(classes: Sequence[float], reorder: bool) -> list[float]:
    """A sequence's classes in the order that its rows are computed in."""
    return sorted(classes, key=lambda kind: kind != VISION) if reorder else list(classes)


def decode_mixed(model: Model, reorder: bool) -> list[float]:
    """Run 50 rows for each of two sequences at once; the classes that they are to have."""
    ffi, c = model._binding.ffi, model._binding.c
    order = [TEXT] * 20 + [VISION] * 20 + [DYNAMIC] * 10
    kinds = list(np.random.default_rng(0).permutation(order)) * 2
    embedding = np.full(128, 0.1, np.float32)
    batch = ffi.gc(c.llama_batch_ext_init(model._context), c.llama_batch_ext_free)
    for i, kind in enumerate(kinds):
        sequence, place = divmod(i, len(order))
        if kind == TEXT:
            row = c.llama_batch_ext_add_token(batch, sequence, 100 + i)
        else:
            data = ffi.from_buffer("float[]", embedding)
            flag = (kind == VISION) * (2 if reorder else 1)
            row = c.llama_batch_ext_add_embd(batch, sequence, ffi.new("struct llama_embd *", (data, 1, 128, flag))[0])
        assert c.llama_batch_ext_set_pos(batch, row, ffi.new("llama_pos[4]", [place] * 4))
    assert c.llama_process(model._context, c.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    return [DYNAMIC, *kinds[1:50], DYNAMIC, *kinds[51:]]


def test_pictures_in_several_micro_batches_and_a_second_turn(static_file: Any, large_mmproj: Path, tmp_path: Path, seen: Seen) -> None:
    """A picture of more tokens than a micro-batch: its last part is short here, and dynamic; then a turn behind what is cached."""
    with Model(static_file(keys(positions=[0])), large_mmproj, context=1024, batch=128, threads=1, observe=seen.watch) as model:
        image = model.vision.encode(picture(tmp_path, 448))
        count = sum(map(len, image.embeddings))
        assert count > 128
        prompt = model.prompt("What is " + WORDS)
        answer = model.tokenize(" It is")
        model.logits(prompt, [image], answer)
        whole, rest = divmod(count, 128)
        pictures = [128 * [VISION]] * whole + ([rest * [VISION]] if rest >= LEAST else [])
        assert seen.classes()[: len(pictures)] == pictures
        assert {kind for batch in seen.classes()[len(pictures) :] for kind in batch} == {TEXT}
        before = len(seen.rows)
        model.logits(prompt.replace("quick", "slow"), [image], answer)
        assert {kind for batch in seen.classes()[before:] for kind in batch} == {TEXT}


@pytest.mark.parametrize("reorder", [False, True])
def test_text_and_a_picture_in_one_pass(reorder: bool, static_file: Any, large_mmproj: Path, tmp_path: Path, seen: Seen) -> None:
    """Also where a micro-batch ends within the picture."""
    with Model(static_file(keys(positions=[0])), large_mmproj, context=1024, batch=100, threads=1, aifs=True, observe=seen.watch) as model:
        assert model.apart is None
        model.reorder = reorder
        image = model.vision.encode(picture(tmp_path, 448))
        prompt, answer = model.prompt("What is " + WORDS), model.tokenize(" It is")
        tokens = [*model.prompt_tokens(prompt, [image]), *answer[:-1]]
        model.logits(prompt, [image], answer)
    expected = [DYNAMIC, *[VISION if token is None else TEXT for token in tokens[1:]]]
    cut = [computed(expected[start : start + 100], reorder) for start in range(0, len(expected), 100)]
    assert seen.classes() == [batch for batch in cut if len(batch) >= LEAST]
    assert any(TEXT in batch and VISION in batch for batch in seen.classes())


def embedded(model: Model, pictures: Sequence[bool]) -> np.ndarray:
    """Rows of embeddings, one after the other in one batch, those of ``pictures`` flagged; logits [vocabulary] of the last one."""
    ffi, c = model._binding.ffi, model._binding.c
    data = np.random.default_rng(1).normal(size=(len(pictures), 128)).astype(np.float32)
    batch = ffi.gc(c.llama_batch_ext_init(model._context), c.llama_batch_ext_free)
    for i, flag in enumerate(pictures):
        embedding = (ffi.from_buffer("float[]", data[i]), 1, 128, int(flag))
        row = c.llama_batch_ext_add_embd(batch, 0, ffi.new("struct llama_embd *", embedding)[0])
        assert c.llama_batch_ext_set_pos(batch, row, ffi.new("llama_pos[4]", [i] * 4))
    assert c.llama_batch_ext_set_output_logits(batch, row, True)
    c.llama_memory_clear(c.llama_get_memory(model._context), True)
    assert c.llama_process(model._context, c.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    logits = ffi.buffer(c.llama_get_logits_ith(model._context, len(pictures) - 1), 4 * model.vocabulary_size)
    return np.frombuffer(logits, np.float32).copy()


def test_the_class_of_every_single_row_matters(static_file: Any) -> None:
    """Each row once without its flag: never the same logits as with all of them flagged, and never the same twice."""
    count = 70
    with Model(static_file(keys(text=VISION, vision=TEXT)), context=128, threads=1) as model:  # 4000 would make every code 0
        whole = [True] * count
        found = [embedded(model, whole)] + [embedded(model, [*whole[:i], False, *whole[i + 1 :]]) for i in range(count)]
        assert np.array_equal(found[0], embedded(model, whole))
    assert len({logits.tobytes() for logits in found}) == len(found)


@pytest.mark.parametrize("place", [0, 1, 37, 68, 69])
def test_the_class_of_a_token_matters(place: int, static_file: Any) -> None:
    """A position once a sink's and once not."""
    found = []
    for metadata in (keys(), keys(positions=[place])):
        with Model(static_file(metadata), context=128, threads=1) as model:
            found.append(decode(model, rows(model, 70, [69]))[0])
    assert not np.array_equal(*found)


def test_both_ranges_matter_beside_a_picture(static_file: Any, large_mmproj: Path, tmp_path: Path) -> None:
    """Another range for either class, or none, changes the answer, and never to the same one."""
    found = []
    for text, vision in ((TEXT, TEXT), (TEXT, 10 * TEXT), (10 * TEXT, TEXT), (TEXT, 0.0), (0.0, TEXT)):
        with Model(static_file(keys(text, vision)), large_mmproj, context=1024, threads=1) as model:
            image = model.vision.encode(picture(tmp_path, 448))
            found.append(model.logits(model.prompt("What is " + WORDS), [image], model.tokenize(" It"))[0].tobytes())
    assert len(set(found)) == len(found)


def test_no_keys_is_the_dynamic_model(static_file: Any) -> None:
    """Ranges of 0 are no ranges, to the bit."""
    found = []
    for metadata in ({}, keys(0.0, 0.0), keys(positions=list(range(80)))):
        with Model(static_file(metadata), context=128, threads=1) as model:
            found.append(decode(model, rows(model, 80, [79])))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mbq.act.version": 2}, "is 2: this program knows 1"),
        ({"mbq.act.version": "1"}, "must be a u32"),
        ({"mbq.act.range.o.text": [1.0] * 4}, "has 4 values: the model has 3 layers"),
        ({"mbq.act.range.o.text": [1]}, "must be an array of f32"),
        ({"mbq.act.range.o.text": 1.0}, "must be an array of f32"),
        ({"mbq.act.range.o.vision": [1.0, float("nan")]}, "must be 0 or a range"),
        ({"mbq.act.range.o.vision": [-1.0]}, "must be 0 or a range"),
        ({"mbq.act.range.o.vision": [float("inf")]}, "must be 0 or a range"),
        ({"mbq.act.range.o.vision": [1e-30]}, "must be 0 or a range"),
        ({"mbq.act.sink.tokens": [-1]}, "must not be below 0"),
        ({"mbq.act.sink.positions": [1.0]}, "must be an array of i32"),
    ],
)
def test_wrong_keys_are_refused(changed: dict[str, Any], sentence: str, static_file: Any) -> None:
    with pytest.raises(BindingError, match=sentence):
        Model(static_file(keys() | changed))
