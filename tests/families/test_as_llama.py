"""InternLM2 and Phi-3 read as Llama, against their original forms: the rows that llama.cpp's class for InternLM2 writes, transformers'
Phi-3, and SentencePiece's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mbq_cbind.model import Model
from mbq_gguf.errors import UserError
from mbq_gguf.export.conversion import load_package, open_model
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.models.as_llama import parts_of, settings
from mbq_gguf.models.tokenizer import Pieces, of_pieces
from published import ADDED, FIRST, by_key_head
from quirk import Held
from quirks import plain_frequencies
from recipe import write
from recipes_internvl import PHI3_ROPE
from sentencepiece import SentencePieceProcessor
from small import QUESTION, Small, compare
from tokens import BYTE, NORMAL, sentencepiece

NAMES = ("InternVL 2 and 2.5 (InternLM2)", "InternVL 2 (Phi-3)")
ENDS = dict(zip(NAMES, ("<|im_end|>", "<|end|>"), strict=True))
TEXTS = ("the the cat", " a cat  in\nthe  hat ", "cathéat☃", "", " ")
BF16 = 0.03  # of the range of the logits, as for families


@pytest.fixture(scope="module", params=NAMES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(request.param, tmp_path_factory.mktemp("small"))


@torch.inference_mode()
def test_it_is_the_model_that_was_published(small: Small) -> None:
    """Of transformers' own class: Phi-3's with its merged matrices, and for InternLM2, which has none, the renamed Llama."""
    from transformers import AutoModelForImageTextToText

    folder = write(replace(small.recipe, publish=None), small.folder / "unpublished")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    theirs = model.eval()(**small.encoded.inputs).logits
    ours = small.loaded.model(**small.encoded.inputs).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert (type(model.model.language_model).__name__ == "Phi3Model") == (small.name == NAMES[1])


def test_the_end_of_a_turn_ends_an_answer(small: Small) -> None:
    """In calibration and at run time; the settings name the end of a document."""
    tokenizer = small.loaded.prompts.tokenizer
    end = tokenizer.convert_tokens_to_ids(ENDS[small.name])
    assert tokenizer.eos_token_id == end
    assert small.encoded.ids[small.encoded.answer][-1] == end
    assert read_header(small.written("header")[0]).metadata["tokenizer.ggml.eos_token_id"] == end


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(NAMES[0], tmp_path_factory.mktemp("internlm2"))


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(NAMES[1], tmp_path_factory.mktemp("phi3"))


def test_rows_are_where_llama_cpp_s_own_class_has_them(internlm2: Small) -> None:
    """Row numbers of a merged matrix through both: 8 heads of 16 channels, 4 to a key head, as the file has them."""
    rows, name = torch.arange((8 + 2 * 2) * 16).float().unsqueeze(1).expand(-1, 128), "model.layers.1.attention.wqkv.weight"
    package = load_package()
    own = package.conversion.get_model_class("InternLM2ForCausalLM", mmproj=False)
    theirs = own(internlm2.directory, package.gguf.LlamaFileType.MOSTLY_BF16, internlm2.folder / "own.gguf")
    expected = dict(theirs.modify_tensors(rows, name, 1))
    model = open_model(internlm2.directory, internlm2.folder / "ours.gguf", file_type="BF16", mmproj=False)
    found: dict[str, torch.Tensor] = {}
    for part, moved in zip("qkv", parts_of(name, rows, 8, 2), strict=True):
        found |= model.modify_tensors(moved, f"model.layers.1.self_attn.{part}_proj.weight", 1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bias_is_cut_as_its_matrix_is() -> None:
    parts = [torch.arange(rows) + first for rows, first in ((128, 0), (32, 1000), (32, 2000))]
    merged = {"attention.wqkv.bias": by_key_head(parts, 2), "self_attn.qkv_proj.bias": torch.cat(parts)}
    for name, tensor in merged.items():
        for ours, theirs in zip(parts_of(name, tensor, 8, 2), parts, strict=True):
            assert torch.equal(ours, theirs)


def test_a_long_context_has_the_long_factors(phi3: Small) -> None:
    """llama.cpp takes them by the context's size, transformers by the text's."""
    files, answer = phi3.written("bf16"), phi3.encoded.ids[phi3.encoded.answer].tolist()
    with Model(*files, context=2048, threads=1) as model:
        ours = model.logits(model.prompt(QUESTION), [model.vision.encode(phi3.picture)], answer)
    _, apart = compare(ours, phi3.theirs())
    assert apart > BF16
    long = plain_frequencies(16) / torch.tensor(PHI3_ROPE["long_factor"])
    with Held("inv_freq", lambda _: long).ignored(phi3):
        _, difference = compare(ours, phi3.theirs())
    assert difference <= BF16


def test_white_space_behind_a_turn_is_left_out(phi3: Small) -> None:
    """As the settings say; the runtime goes by the model's name."""
    assert "Phi-3" in read_header(phi3.written("header")[0]).metadata["general.name"]
    ids = phi3.loaded.prompts.tokenizer("<|user|>\n the<|end|>\n", add_special_tokens=False)["input_ids"]
    user, *words, end = ids
    assert (user, end) == tuple(phi3.loaded.prompts.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"]))
    assert phi3.loaded.prompts.tokenizer.decode(words) == "the"


@pytest.mark.parametrize("changed", [{"sliding_window": 2047}, {"partial_rotary_factor": 0.75}], ids=str)
def test_what_llama_does_not_compute_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(UserError, match="without sliding window and partial rotary embedding"):
        settings({"model_type": "phi3", "max_position_embeddings": 4096, **changed})


@pytest.mark.parametrize("space", [False, True])
def test_tokens_are_sentencepieces(tmp_path: Path, space: bool) -> None:
    """Letters, bytes where there is no letter, and pairs of which the better one is not the first."""
    words = ("▁the", "the", "he", "at", "▁", "▁▁", "ca", "▁c", "cat", "th", *"thecain")
    pieces = [*FIRST, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), *((word, NORMAL) for word in words)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(pieces, space))
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    added = {str(number): {"content": token, "special": True} for number, token in enumerate(ADDED)}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    tokenizer = of_pieces(Pieces(original, {**names, "added_tokens_decoder": added}))
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer(text)["input_ids"] == [1, *ids], text
        assert tokenizer.decode(ids) == text
    turn = tokenizer("<|im_start|>a cat<|im_end|>", add_special_tokens=False)["input_ids"]
    assert turn == [3, *original.encode("a cat"), 4]
    assert tokenizer("[UNUSED_TOKEN_142]", add_special_tokens=False)["input_ids"] != [3]
