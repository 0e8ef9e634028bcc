"""Tokens and merges are read once and packed as a whole: bytes are the same as llama.cpp's, and other files are read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.export import vocabulary
from mbq_gguf.export.conversion import load_package, open_model, quiet
from mbq_gguf.export.vocabulary import pack_array

VALUES: list[list[Any]] = [["a", "", "🦙 é", "x" * 70_000], [0, -1, 2**31 - 1, -(2**31)], [True, False], [0.5, 1.5], [[1, 2], [3]]]


@pytest.fixture(autouse=True)
def _nothing_kept(built_llama: Path) -> Iterator[None]:
    vocabulary._kept.clear()
    yield
    vocabulary._kept.clear()


def tokens(model_dir: Path) -> dict[str, Any]:
    """What the package says of the vocabulary of ``model_dir``."""
    model = open_model(model_dir, model_dir / "out.gguf", file_type="BF16", mmproj=False)
    with quiet():
        model.set_vocab()
    return {key: value.value for key, value in model.gguf_writer.kv_data[0].items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("values", VALUES, ids=["text", "int", "bool", "float", "lists"])
def test_arrays_are_packed_as_item_by_item(values: list[Any], big: bool) -> None:
    gguf = load_package().gguf
    writer = gguf.GGUFWriter(None, "llama", endianess=gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE)
    kind, typed = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.get_type(values[0])
    items = b"".join(writer._pack_val(value, typed, add_vtype=False) for value in values)
    head = b"".join(writer._pack(letter, value) for letter, value in (("I", typed), ("Q", len(values))))
    assert writer._pack_val(values, kind, add_vtype=False) == head + items
    assert writer._pack_val(values, kind, add_vtype=True) == writer._pack("I", kind) + head + items
    assert (pack_array(values, "<") is None) == (type(values[0]) not in (str, int))


@pytest.mark.parametrize("values", [[1, "a"], [2**31], ["\ud800"]], ids=["mixed", "large", "surrogate"])
def test_what_no_array_holds_is_refused_as_before(values: list[Any]) -> None:
    gguf = load_package().gguf
    with pytest.raises(Exception, match=r"same type|format|surrogates"):
        gguf.GGUFWriter(None, "llama")._pack_val(values, gguf.GGUFValueType.ARRAY, add_vtype=True)


def test_a_second_look_reads_nothing_and_gets_lists_of_its_own(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens(tiny_dir)
    assert len(first["tokenizer.ggml.tokens"]) == len(first["tokenizer.ggml.token_type"]) > len(first["tokenizer.ggml.merges"]) > 40_000
    changed = tokens(tiny_dir)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", None)
        changed["tokenizer.ggml.tokens"].clear()
        assert tokens(tiny_dir) == first


def test_another_tokenizer_is_read(tiny_dir: Path, tmp_path: Path) -> None:
    tokens(tiny_dir)
    copy = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    [*kept, last] = content["model"]["merges"]
    content["model"]["merges"] = kept
    file.write_text(json.dumps(content), encoding="utf-8")
    assert len(tokens(copy)["tokenizer.ggml.merges"]) == len(tokens(tiny_dir)["tokenizer.ggml.merges"]) - 1, last
