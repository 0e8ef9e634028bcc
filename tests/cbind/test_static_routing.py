"""Static ranges in a whole model: every row has the range of its class, and the class of every single row matters.

The ranges that llama.cpp's graph picks are observed as it computes them. The file's differ by a factor of 1000 from class to class.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models import load
from PIL import Image

SITES = ("qkv", "o", "gate_up", "down")
LAYERS = 3
TEXT, VISION, DYNAMIC = 4.0, 4000.0, 0.0
LEAST = 65  # rows of a batch with static ranges
WORDS = "The quick brown fox jumps over the lazy dog and runs into the deep dark forest. " * 6


def keys(text: float = TEXT, vision: float = VISION, **more: Any) -> dict[str, Any]:
    """A layer's ranges differ by a quarter from its neighbour's, so that a site of the wrong layer shows too."""
    found: dict[str, Any] = {"mbq.act.version": 1}
    for site in SITES:
        for kind, value in (("text", text), ("vision", vision)):
            found[f"mbq.act.range.{site}.{kind}"] = [value * (1 + layer / 4) for layer in range(LAYERS)]
    return found | {f"mbq.act.sink.{name}": values for name, values in more.items()}


@pytest.fixture(scope="module")
def plain(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The tiny VLM as W4A8, without static ranges."""
    path, weights = tmp_path_factory.mktemp("static") / "plain.gguf", {}
    for key, parameter in load(tiny_dir).decoder.module.named_parameters():
        if key.startswith("layers.") and parameter.ndim == 2:
            chosen = quant_type_for("W4A8", parameter.shape[1])
            weights[key] = QuantisedTensor(chosen.name, chosen.quantize(parameter.float().numpy()), parameter.shape[1])
    common = {"replaced": {}, "base_type": "BF16", "embedding_type": "BF16", "metadata": {}, "file_type": None}
    write_text_gguf(tiny_dir, path, quantised=weights, **common)  # type: ignore[arg-type]
    return path.read_bytes()


@pytest.fixture
def files(plain: bytes, tmp_path: Path) -> Any:
    """Writes that file with the keys that it is given."""

    def write(metadata: dict[str, Any]) -> Path:
        path = tmp_path / "static.gguf"
        path.write_bytes(with_keys(plain, metadata))
        return path

    return write


def with_keys(data: bytes, metadata: dict[str, Any]) -> bytes:
    """A GGUF file with more keys, put before its own; 32 bytes and multiples of them, so that its tensors stay aligned."""
    added = b"".join(string(name) + value(content) for name, content in metadata.items())
    room = string("test.room") + struct.pack("<IQ", 8, 0)
    filled = -(len(added) + len(room)) % 32
    added += string("test.room") + struct.pack("<IQ", 8, filled) + bytes(filled)
    count = struct.unpack_from("<Q", data, 16)[0] + len(metadata) + 1
    return data[:16] + struct.pack("<Q", count) + added + data[24:]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def value(content: Any) -> bytes:
    """A key's type and value; whole numbers are u32 by themselves and i32 in an array, as the converter writes them."""
    if isinstance(content, list):
        kind, form = (6, "f") if isinstance(content[0], float) else (5, "i")
        return struct.pack(f"<IIQ{len(content)}{form}", 9, kind, len(content), *content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + string(content)
    return struct.pack("<If", 6, content) if isinstance(content, float) else struct.pack("<II", 4, content)


@pytest.fixture(scope="module")
def mmproj(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vision file, which lets pictures have more than 64 tokens."""
    out = tmp_path_factory.mktemp("mmproj") / "mmproj.gguf"
    write_mmproj_gguf(tiny_dir, out, mmproj_type="F16")
    data, key = bytearray(out.read_bytes()), b"clip.vision.image_max_pixels"
    struct.pack_into("<II", data, data.index(key) + len(key), 4, 1 << 20)
    out.write_bytes(data)
    return out


class Seen:
    """The ranges of every micro-batch that had any: of all rows, and of those behind the last attention."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.out: list[np.ndarray] = []

    @property
    def watch(self) -> dict[str, Any]:
        return {"mbq_act_ranges": self.rows.append, "mbq_act_ranges_out": self.out.append}

    def classes(self) -> list[list[float]]:
        """The class of every row, by micro-batch: each row's ranges are those of one class at all sites."""
        return [classes(ranges) for ranges in self.rows]


def classes(ranges: np.ndarray) -> list[float]:
    layers = np.repeat(1 + np.arange(LAYERS) / 4, len(SITES))
    first = ranges[:, 0]
    assert np.allclose(ranges, first[:, None] * layers, rtol=1e-6)
    return [float(value) for value in first]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def model(files: Any, seen: Seen) -> Iterator[Model]:
    with Model(files(keys(positions=[0])), context=512, batch=256, threads=1, observe=seen.watch) as opened:
        yield opened


def decode(model: Model, rows: Sequence[tuple[int, int, int, bool]], embeddings: np.ndarray | None = None) -> np.ndarray:
    """Run ``rows`` (token, position, sequence, logits wanted) as one batch: logits [wanted, vocabulary]. ``embeddings`` replace tokens."""
    ffi, c = model._binding.ffi, model._binding.c
    width = 0 if embeddings is None else embeddings.shape[1]
    batch = c.llama_batch_init(len(rows), width, 1)
    try:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            if embeddings is None:
                batch.token[i] = token
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
            batch.pos[i] = position
        if embeddings is not None:
            ffi.memmove(batch.embd, ffi.from_buffer(embeddings), embeddings.nbytes)
        assert c.llama_decode(model._context, batch) == 0
    finally:
        c.llama_batch_free(batch)
    found = [c.llama_get_logits_ith(model._context, i) for i, row in enumerate(rows) if row[3]]
    return np.array([np.frombuffer(ffi.buffer(row, 4 * model.vocabulary_size), np.float32) for row in found])


def rows(model: Model, count: int, wanted: Sequence[int] = (), sequence: int = 0, start: int = 0) -> list[tuple[int, int, int, bool]]:
    tokens = model.tokenize(WORDS)[:count]
    assert len(tokens) == count
    return [(token, start + i, sequence, i in wanted) for i, token in enumerate(tokens)]


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


def test_a_sink_by_its_token(files: Any, seen: Seen) -> None:
    with Model(files(keys()), context=512, threads=1) as plain:
        tokens = plain.tokenize(WORDS)[:80]
    sinks = sorted({tokens[3], tokens[10]})
    with Model(files(keys(tokens=sinks)), context=512, threads=1, observe=seen.watch) as model:
        decode(model, rows(model, 80))
    assert seen.classes() == [[DYNAMIC if token in sinks else TEXT for token in tokens]]


class Several(Model):
    """With room for two sequences."""

    def _open_context(self, *arguments: Any) -> Any:
        c, defaults = self._binding.c, self._binding.c.llama_context_default_params

        def parameters() -> Any:
            found = defaults()
            found.n_seq_max = 2
            return found

        c.llama_context_default_params = parameters
        try:
            return super()._open_context(*arguments)
        finally:
            c.llama_context_default_params = defaults


def test_a_mixed_batch_of_two_sequences(files: Any, seen: Seen) -> None:
    """Tokens, a picture's rows and other embeddings in one micro-batch, in any order; each sequence begins with a sink."""
    with Several(files(keys(positions=[0])), context=512, threads=1, observe=seen.watch) as model:
        expected = decode_mixed(model)
    assert seen.classes() == [expected]


def decode_mixed(model: Model) -> list[float]:
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
            row = c.llama_batch_ext_add_embd(batch, sequence, ffi.new("struct llama_embd *", (data, 1, 128, int(kind == VISION)))[0])
        assert c.llama_batch_ext_set_pos(batch, row, ffi.new("llama_pos[4]", [place] * 4))
    assert c.llama_process(model._context, c.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    return [DYNAMIC, *kinds[1:50], DYNAMIC, *kinds[51:]]


def picture(folder: Path, side: int) -> Path:
    path = folder / f"{side}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def test_pictures_in_several_micro_batches_and_a_second_turn(files: Any, mmproj: Path, tmp_path: Path, seen: Seen) -> None:
    """A picture of more tokens than a micro-batch: its last part is short here, and dynamic; then a turn behind what is cached."""
    with Model(files(keys(positions=[0])), mmproj, context=1024, batch=128, threads=1, observe=seen.watch) as model:
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


def test_text_and_a_picture_in_one_pass(files: Any, mmproj: Path, tmp_path: Path, seen: Seen) -> None:
    """Also where a micro-batch ends within the picture."""
    with Model(files(keys(positions=[0])), mmproj, context=1024, batch=100, threads=1, aifs=True, observe=seen.watch) as model:
        assert model.apart is None
        image = model.vision.encode(picture(tmp_path, 448))
        prompt, answer = model.prompt("What is " + WORDS), model.tokenize(" It is")
        tokens = [*model.prompt_tokens(prompt, [image]), *answer[:-1]]
        model.logits(prompt, [image], answer)
    expected = [DYNAMIC, *[VISION if token is None else TEXT for token in tokens[1:]]]
    cut = [expected[start : start + 100] for start in range(0, len(expected), 100)]
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


def test_the_class_of_every_single_row_matters(files: Any) -> None:
    """Each row once without its flag: never the same logits as with all of them flagged, and never the same twice."""
    count = 70
    with Model(files(keys(text=VISION, vision=TEXT)), context=128, threads=1) as model:  # 4000 would make every code 0
        whole = [True] * count
        found = [embedded(model, whole)] + [embedded(model, [*whole[:i], False, *whole[i + 1 :]]) for i in range(count)]
        assert np.array_equal(found[0], embedded(model, whole))
    assert len({logits.tobytes() for logits in found}) == len(found)


@pytest.mark.parametrize("place", [0, 1, 37, 68, 69])
def test_the_class_of_a_token_matters(place: int, files: Any) -> None:
    """A position once a sink's and once not."""
    found = []
    for metadata in (keys(), keys(positions=[place])):
        with Model(files(metadata), context=128, threads=1) as model:
            found.append(decode(model, rows(model, 70, [69]))[0])
    assert not np.array_equal(*found)


def test_both_ranges_matter_beside_a_picture(files: Any, mmproj: Path, tmp_path: Path) -> None:
    """Another range for either class, or none, changes the answer, and never to the same one."""
    found = []
    for text, vision in ((TEXT, TEXT), (TEXT, 10 * TEXT), (10 * TEXT, TEXT), (TEXT, 0.0), (0.0, TEXT)):
        with Model(files(keys(text, vision)), mmproj, context=1024, threads=1) as model:
            image = model.vision.encode(picture(tmp_path, 448))
            found.append(model.logits(model.prompt("What is " + WORDS), [image], model.tokenize(" It"))[0].tobytes())
    assert len(set(found)) == len(found)


def test_no_keys_is_the_dynamic_model(files: Any) -> None:
    """Ranges of 0 are no ranges, to the bit."""
    found = []
    for metadata in ({}, keys(0.0, 0.0), keys(positions=list(range(80)))):
        with Model(files(metadata), context=128, threads=1) as model:
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
def test_wrong_keys_are_refused(changed: dict[str, Any], sentence: str, files: Any) -> None:
    with pytest.raises(BindingError, match=sentence):
        Model(files(keys() | changed))
