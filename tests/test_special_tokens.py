"""Special tokens and invalid text in a question or a set: one message with its place, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from mbq_cbind.model import Model
from mbq_gguf.cli import main
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from mbq_gguf.export.gguf_specials import file_special_tokens
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.server import LlamaServer, data_url
from mbq_gguf.models import LoadedModel
from mbq_gguf.special_tokens import tokenizer_special_tokens

PICTURE = load_questions(SHIPPED)[0].image
SPECIAL = ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"]


class Pair(NamedTuple):
    model: Path
    mmproj: Path


@pytest.fixture(scope="module")
def pair(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The tiny VLM in BF16."""
    folder = tmp_path_factory.mktemp("words")
    found = Pair(folder / "model.gguf", folder / "mmproj-model.gguf")
    write_text_gguf(tiny_dir, found.model, quantised={}, replaced={}, base_type="BF16", embedding_type="BF16", metadata={}, file_type=None)
    write_mmproj_gguf(tiny_dir, found.mmproj, mmproj_type="BF16")
    return found


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (sentence,) = result.stderr.strip().splitlines()[-1:]
    return sentence


def write_set(folder: Path, question: str, answer: str) -> Path:
    """A set whose second line says so."""
    shutil.copy(PICTURE, folder / "a.png")
    turns = [("What?", "blue"), (question, answer)]
    lines = [json.dumps({"image": "a.png", "turns": [{"question": q, "answer": a}]}) for q, a in turns]
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


def test_reader_and_file_know_the_same_special_tokens(pair: Pair, tiny: LoadedModel) -> None:
    assert file_special_tokens(pair.model) == tokenizer_special_tokens(tiny.prompts.tokenizer) > set(SPECIAL)


@pytest.mark.parametrize("token", SPECIAL)
def test_ask(token: str, pair: Pair) -> None:
    assert f"contains the model's special token {token}" in refused("ask", pair.model, PICTURE, f"What is {token} this?")


def test_ask_what_is_no_text(pair: Pair) -> None:
    assert "the question: 'bad \\udcff' is not valid UTF-8" in refused("ask", pair.model, PICTURE, "bad \udcff")


@pytest.mark.parametrize("said", [("What is <|image_pad|> this?", "blue"), ("What?", "blue<|im_end|>")], ids=["question", "answer"])
@pytest.mark.parametrize("command", ["convert", "imatrix", "eval"])
def test_sets(command: str, said: tuple[str, str], pair: Pair, tiny_dir: Path, tmp_path: Path) -> None:
    data = write_set(tmp_path, *said)
    if command == "eval":
        sentence = refused("eval", pair.model, pair.model, "--mmproj", pair.mmproj, "--data", data)
    else:
        sentence = refused(command, tiny_dir, tmp_path / "out.gguf", "--calib", data)
    assert f"{data}, line 2: " in sentence
    assert "contains the model's special token <|im" in sentence


def test_half_a_pair_of_surrogates_in_a_set(pair: Pair, tmp_path: Path) -> None:
    data = write_set(tmp_path, "a \ud800 b", "blue")
    assert f"{data}, line 2: Invalid JSON" in refused("eval", pair.model, pair.model, "--mmproj", pair.mmproj, "--data", data)


def test_the_marker_of_pictures_is_text_to_server_and_bindings(pair: Pair) -> None:
    """As many tokens as the server counts, and libmtmd's default marker asks for no second picture."""
    question = "What is <__media__> this?"
    with Model(pair.model, pair.mmproj, threads=1, context=512) as model:
        image = model.vision.encode(PICTURE)
        tokens = model.prompt_tokens(model.prompt(question), [image])
        assert "<__media__>" in model.text([token for token in tokens if token is not None])
    with LlamaServer(pair.model, pair.mmproj, threads=1, ctx=512) as server:
        parts = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        reply = lockdown.request("POST", f"{server.url}/v1/chat/completions", server.key, 60, body).json()
    assert reply["usage"]["prompt_tokens"] == len(tokens)


def test_a_text_file_is_text(pair: Pair) -> None:
    """What eval --text reads goes through no chat template: there a special token's name is its letters, as in llama-perplexity."""
    with Model(pair.model, threads=1, context=512) as model:
        assert len(model.tokenize("<|im_end|>")) > 1
