"""InternLM2 beside what its own form is held against: the rows that llama.cpp's class for it writes, and SentencePiece's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mbq_gguf.export.conversion import load_package, open_model
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.models.internlm2 import parts_of
from mbq_gguf.models.tokenizer import of_pieces
from published import ADDED, FIRST, by_key_head
from sentencepiece import SentencePieceProcessor
from small import Small
from tokens import BYTE, NORMAL, sentencepiece

NAME = "InternVL 2 and 2.5 (InternLM2)"
TEXTS = ("the the cat", " a cat  in\nthe  hat ", "cathéat☃", "", " ")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(NAME, tmp_path_factory.mktemp("internlm2"))


def test_rows_are_where_llama_cpp_s_own_class_has_them(small: Small) -> None:
    """Row numbers of a merged matrix through both: 8 heads of 16 channels, 4 to a key head, as the file has them."""
    rows = torch.arange((8 + 2 * 2) * 16).float().unsqueeze(1).expand(-1, 128)
    package = load_package()
    own = package.conversion.get_model_class("InternLM2ForCausalLM", mmproj=False)
    theirs = own(small.directory, package.gguf.LlamaFileType.MOSTLY_BF16, small.folder / "own.gguf")
    expected = dict(theirs.modify_tensors(rows, "model.layers.1.attention.wqkv.weight", 1))
    model = open_model(small.directory, small.folder / "ours.gguf", file_type="BF16", mmproj=False)
    found: dict[str, torch.Tensor] = {}
    for part, moved in zip("qkv", parts_of(rows, 8, 2), strict=True):
        found |= model.modify_tensors(moved, f"model.layers.1.self_attn.{part}_proj.weight", 1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bias_is_cut_as_its_matrix_is() -> None:
    parts = [torch.arange(rows) + first for rows, first in ((128, 0), (32, 1000), (32, 2000))]
    for ours, theirs in zip(parts_of(by_key_head(parts, 2), 8, 2), parts, strict=True):
        assert torch.equal(ours, theirs)


def test_the_end_of_a_turn_ends_an_answer(small: Small) -> None:
    """In calibration and at run time; the settings name the end of a document."""
    end = ADDED.index("<|im_end|>")
    assert small.loaded.prompts.tokenizer.eos_token_id == end
    assert small.encoded.ids[small.encoded.answer][-1] == end
    metadata = read_header(small.written("header")[0]).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == end


@pytest.mark.parametrize("space", [False, True])
def test_tokens_are_sentencepieces(tmp_path: Path, space: bool) -> None:
    """Letters, bytes where there is no letter, and pairs of which the better one is not the first."""
    words = ("▁the", "the", "he", "at", "▁", "▁▁", "ca", "▁c", "cat", "th", *"thecain")
    pieces = [*FIRST, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), *((word, NORMAL) for word in words)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(pieces, space))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    added = {str(number): {"content": token, "special": True} for number, token in enumerate(ADDED)}
    tokenizer = of_pieces(tmp_path, {**names, "added_tokens_decoder": added})
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer(text)["input_ids"] == [1, *ids], text
        assert tokenizer.decode(ids) == text
    turn = tokenizer("<|im_start|>a cat<|im_end|>", add_special_tokens=False)["input_ids"]
    assert turn == [3, *original.encode("a cat"), 4]
    assert tokenizer("[UNUSED_TOKEN_142]", add_special_tokens=False)["input_ids"] != [3]
