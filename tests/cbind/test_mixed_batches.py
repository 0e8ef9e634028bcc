"""Text and pictures in one pass: the minimum number of decode calls, and the logits of separate decodes. Other families: tests/families.

Some runs have pictures first in each micro-batch (``--aifs reorder``), which tests/cbind/test_static_routing.py shows row by row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind import types
from mbq_cbind.library import load_whole
from mbq_cbind.model import Model
from mbq_cbind.types import Bytes, Floats
from mbq_cbind.vision import EncodedImage
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from nearest_files import write_nearest
from reference_models import Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import random_gguf  # noqa: E402

PICTURES = sorted((ROOT / "converter/mbq_gguf/demo/data/eval/images").glob("*.png"))[:8]
LIMIT = 1e-4  # of max |logit|; measured: 3e-7 at most, and mostly equal bits
# M stands for a picture
PROMPTS = ("No picture?", "MWhat is first?", "In the M middle", "At the last M", "M with M and M", "MMMMMMMM counted")
LONG = "M" + "and so on " * 40 + "M" + "to the end " * 30
UBATCH = 48  # pictures of 64 tokens are cut, and the long prompt takes several


@pytest.fixture(scope="module")
def files(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """All weights in F32."""
    folder = tmp_path_factory.mktemp("one-pass")
    made = Files(folder / "text.gguf", folder / "mmproj.gguf")
    common = {"replaced": {}, "base_type": "F32", "embedding_type": "F32", "metadata": {}, "file_type": None}
    write_text_gguf(tiny_dir, made.text, quantised={}, **common)
    write_mmproj_gguf(tiny_dir, made.mmproj, mmproj_type="F32")
    return made


def opened(files: Files, *, aifs: bool, batch: int = 512, flash_attention: bool = False) -> Model:
    return Model(files.text, files.mmproj, threads=1, context=2048, batch=batch, aifs=aifs, flash_attention=flash_attention)


@pytest.fixture(scope="module")
def in_turns(files: Files) -> Iterator[Model]:
    with opened(files, aifs=False) as model:
        yield model


@pytest.fixture(scope="module", params=[(512, "on"), (UBATCH, "on"), (512, "reorder"), (UBATCH, "reorder")], ids="{0[0]}-{0[1]}".format)
def at_once(request: pytest.FixtureRequest, files: Files) -> Iterator[Model]:
    batch, mode = request.param
    with opened(files, aifs=True, batch=batch) as model:
        model.reorder = mode == "reorder"
        yield model


@pytest.fixture(scope="module")
def images(in_turns: Model) -> list[EncodedImage]:
    return [in_turns.vision.encode(picture) for picture in PICTURES]


def prompt(model: Model, words: str) -> str:
    return model.prompt(words, images=0).replace("M", model.vision.marker)


def difference(ours: Floats, theirs: Floats) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def forget(model: Model) -> None:
    """Nothing is left of what the model was asked before."""
    model.text_logits([1], outputs=1)


@pytest.mark.parametrize("words", [*PROMPTS, LONG])
def test_logits_and_answers_are_those_of_the_decode_in_turns(
    words: str, in_turns: Model, at_once: Model, images: list[EncodedImage]
) -> None:
    shown = images[: words.count("M")]
    answer = in_turns.tokenize("one two three four")
    logits = [model.logits(prompt(model, words), shown, answer) for model in (at_once, in_turns)]
    assert difference(*logits) <= LIMIT
    answers = [model.generate(prompt(model, words), shown, limit=6) for model in (at_once, in_turns)]
    assert answers[0] == answers[1]


def test_a_prompt_is_one_call(in_turns: Model, at_once: Model, images: list[EncodedImage]) -> None:
    assert (at_once.apart, in_turns.apart) == (None, "it is off")
    calls = []
    for model in (at_once, in_turns):
        forget(model)
        before = model.decode_calls
        model.logits(prompt(model, "M with M and M"), images[:3], model.tokenize("one two"))
        calls.append(model.decode_calls - before)
    assert calls == [1, 7]  # four texts, three pictures


def test_a_second_turn_and_a_shared_opening(in_turns: Model, at_once: Model, images: list[EncodedImage]) -> None:
    """The context holds an opening with a picture: what follows joins it, and the logits are those of a context that held nothing."""
    answer = at_once.tokenize("one two three")
    for tail in ("no more", "then M more", "then M other"):
        words = [prompt(model, "M first") + "<|im_end|>\n" + prompt(model, tail) for model in (at_once, in_turns)]
        shown = images[: 1 + tail.count("M")]
        forget(in_turns)
        assert difference(at_once.logits(words[0], shown, answer), in_turns.logits(words[1], shown, answer)) <= LIMIT


def test_pictures_that_do_not_fit_the_context(at_once: Model, images: list[EncodedImage]) -> None:
    with pytest.raises(Exception, match="tokens do not fit the context of 2048"):
        at_once.logits(prompt(at_once, "M" * 40), [images[0]] * 40, [1])
    assert at_once.generate(prompt(at_once, "M still there?"), images[:1], limit=2)  # and the model goes on


@contextmanager
def cut(model: Model, words: str, pictures: list[Path]) -> Iterator[Any]:
    """The prompt as libmtmd's chunks, pictures with their pixels."""
    binding = load_whole()
    ffi, c = binding.ffi, binding.c
    text = words.encode()
    buffer = ffi.new("char[]", text)
    request = ffi.new("mtmd_input_text *", {"text": buffer, "text_len": len(text), "add_special": True, "parse_special": True})
    read = [
        c.mtmd_helper_bitmap_init_from_file(model.vision._context, str(p).encode(), False, c.mtmd_helper_init_opt_default())
        for p in pictures
    ]
    bitmaps = [ffi.gc(item.bitmap, c.mtmd_bitmap_free) for item in read]
    chunks = ffi.gc(c.mtmd_input_chunks_init(), c.mtmd_input_chunks_free)
    assert c.mtmd_tokenize(model.vision._context, chunks, request, ffi.new("mtmd_bitmap *[]", bitmaps), len(bitmaps)) == 0
    yield chunks


@pytest.mark.parametrize("n_batch", [2048, 100, 48, 7])
def test_libmtmds_helper(n_batch: int, at_once: Model) -> None:
    """mtmd_helper_eval_chunks, which encodes for itself: logits and next position are those that it has with one pass turned off."""
    binding = load_whole()
    ffi, c = binding.ffi, binding.c
    vision, context = at_once.vision._context, at_once._context
    results = []
    for mode in (b"reorder" if at_once.reorder else b"on", b"off"):
        assert c.mtmd_aifs_init(vision, context, mode)
        forget(at_once)
        c.llama_memory_clear(c.llama_get_memory(context), True)
        end = ffi.new("llama_pos *")
        with cut(at_once, prompt(at_once, "M and M there"), PICTURES[:2]) as chunks:
            assert c.mtmd_helper_eval_chunks(vision, context, chunks, 0, 0, n_batch, True, end) == 0
        row = ffi.buffer(c.llama_get_logits_ith(context, -1), 4 * at_once.vocabulary_size)
        results.append((np.frombuffer(row, np.float32).copy(), end[0]))
    assert not c.mtmd_aifs_init(vision, context, b"maybe")
    assert c.mtmd_aifs_init(vision, context, b"auto")
    assert results[0][1] == results[1][1]
    assert difference(results[0][0], results[1][0]) <= LIMIT


def test_a_cut_changes_no_bit_with_flash_attention(tiny_dir: Path, files: Files, images: list[EncodedImage], tmp_path: Path) -> None:
    """Where products are the same for any cut, as MBQ3S's are, so are logits: in turns, at once, in micro-batches of any size.

    One token has logits, since the output matrix is in F32, whose products are not.
    """
    write_nearest(tiny_dir, tmp_path / "mbq3s.gguf", "MBQ3S", base_type="F32")
    made = Files(tmp_path / "mbq3s.gguf", files.mmproj)
    found = []
    for aifs, batch in ((False, 512), (True, 512), (True, UBATCH), (True, 7), (True, 100)):
        with opened(made, aifs=aifs, batch=batch, flash_attention=True) as model:
            shown = {words: images[: words.count("M")] for words in ("MM counted", LONG)}
            found.append([model.logits(prompt(model, words), pictures, [1]) for words, pictures in shown.items()])
    for one in found[1:]:
        assert all(np.array_equal(*pair) for pair in zip(one, found[0], strict=True))


KINDS = [
    "F32",
    "BF16",
    "F16",
    "Q8_0",
    "Q5_0",
    "Q4_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q3_K",
    "Q2_K",
    "IQ4_XS",
    "IQ3_S",
    "MBQ3",
    "MBQ3_64",
    "MBQ3S",
    "MBQ3S_64",
]
SMALL = random_gguf.LanguageShape(layers=1, embedding=256, feed_forward=512, heads=2, kv_heads=1, vocabulary=64)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_token_ids_in_a_mixed_batch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other token as the row that its id stands for, copied, or left where it is as a picture's: the logits have the bits of ids
    alone."""
    rows = np.random.default_rng(1).standard_normal((SMALL.vocabulary, SMALL.embedding)).astype(np.float32)
    stored = rows if kind == "F32" else types.quantize(kind, rows)
    exact = rows if kind == "F32" else types.dequantize(kind, stored, SMALL.embedding)
    write_random(tmp_path / "random.gguf", kind, stored, monkeypatch)
    tokens = list(range(3, 51))
    with Model(tmp_path / "random.gguf", threads=1, context=64, flash_attention=False) as model:
        alone = model.text_logits(tokens, outputs=8)
        mixed = [mixed_logits(model, exact, tokens, picture) for picture in (0, 1)]
    assert np.isfinite(alone).all()
    assert len(np.unique(alone, axis=0)) == 8
    assert all(np.array_equal(logits, alone) for logits in mixed)


def mixed_logits(model: Model, exact: Floats, tokens: list[int], picture: int) -> Floats:
    """Logits of the last eight of ``tokens``, every other of which is given as its row of ``exact``, each at an address of its own."""
    ffi, c = model._binding.ffi, model._binding.c
    c.llama_memory_clear(c.llama_get_memory(model._context), True)
    batch = ffi.gc(c.llama_batch_ext_init(model._context), c.llama_batch_ext_free)
    rows = [ffi.from_buffer("float[]", np.array(exact[token], np.float32)) for token in tokens]
    for position, token in enumerate(tokens):
        if position % 2:
            row = {"data": rows[position], "n_rows": 1, "n_embd": SMALL.embedding, "picture": picture}
            index = c.llama_batch_ext_add_embd(batch, 0, row)
        else:
            index = c.llama_batch_ext_add_token(batch, 0, token)
        assert c.llama_batch_ext_set_pos(batch, index, ffi.new("llama_pos[4]", [position] * 3 + [0]))
        c.llama_batch_ext_set_output_logits(batch, index, position >= len(tokens) - 8)
    assert c.llama_process(model._context, c.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    return model._read_logits(len(tokens), 8)


def write_random(path: Path, kind: str, stored: Bytes | Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one layer whose embeddings are ``stored``, of type ``kind``."""
    matrix = random_gguf.random_matrix
    monkeypatch.setattr(
        random_gguf, "tensor_type", lambda _, name, *__: kind if name == "token_embd" else "Q8_0" if kind == "F16" else "F16"
    )
    monkeypatch.setattr(random_gguf, "random_matrix", lambda gguf, name, *size: stored if name == kind else matrix(gguf, name, *size))
    random_gguf.write_random_gguf(path, SMALL, "F16")
