"""Language models that are read as others and converted alone, against their authors' graphs. Takes about twenty seconds of processor time.

The checkpoints and graphs are in text_models.py; test_language_alone.py has what holds for every language model that is converted so.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from authors import Graph, Published
from click.testing import CliRunner
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from mbq_gguf.calibration.generate import written_texts
from mbq_gguf.cli import main
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_text_gguf
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.language_only import language_only_mode
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from rich.console import Console
from safetensors.torch import load_file, save_file
from small import compare, unpacked
from text_models import PUBLISHED

TEXT = "seven of the blue circles are left of the square, and 1234 others aren't:\n\n  all of them red or ❤ \r\n"
GGUF = {"Qwen-VL": "qwen2", "GLM-4V": "chatglm", "CogVLM2": "llama"}
EXACT = 1e-5  # of the range of the logits: transformers' class and the authors' graph, both in float32; measured: 5e-7
BF16 = 0.03  # as for families; measured: 0.0031
INT8 = 0.04  # Q8_0 by rounding to nearest, as for families; measured: 0.0143
QUANTISED = {"MBQ3S": 0.03, "W4A8": 0.04}  # activations rounded to int8 in blocks of 32 or rows; measured: 0.0125 and 0.0169
SETTINGS = QuantiseSettings(synthetic=4, pictures=False, refits=0, clip=False)


class Small:
    """A family's small checkpoint and what is made of it, when it is asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.published: Published = PUBLISHED[name]

    @cached_property
    def directory(self) -> Path:
        return self.published.write(self.folder / "checkpoint")

    @cached_property
    def loaded(self) -> LoadedModel:
        with language_only_mode(True):
            found = load(self.directory)
        found.hold(torch.float32)
        return found

    @cached_property
    def ids(self) -> list[int]:
        return list(self.loaded.prompts.tokenizer(TEXT)["input_ids"])

    def authors(self, graph: Graph | None = None) -> Floats:
        """What the authors' graph, or another, gives of the checkpoint's own tensors, for every token but the last."""
        found: Floats = (graph or self.published.graph).logits(load_file(self.directory / "model.safetensors"), self.ids)[:-1].numpy()
        return found

    def theirs(self, weights: dict[str, Any]) -> Floats:
        """Hugging Face's, with decoder ``weights`` in place of its own."""
        changed = {f"{self.loaded.decoder.path}.{name}": torch.as_tensor(value).float() for name, value in weights.items()}
        inputs = {"input_ids": torch.tensor([self.ids])}
        with torch.inference_mode():
            out: Any = torch.func.functional_call(self.loaded.model, changed, (), inputs)
        found: Floats = out.logits[0, :-1].numpy()
        return found

    def ours(self, file: Path) -> Floats:
        """llama.cpp's, of its own tokens."""
        with Model(file, context=512, threads=1) as model:
            assert model.tokenize(TEXT) == self.ids
            return model.logits(model.text(self.ids[:1]), [], self.ids[1:])

    def written(self, name: str, result: QuantiseResult) -> Path:
        file = self.folder / f"{name}.gguf"
        content = {"quantised": result.quantised, "replaced": result.replaced, "metadata": result.facts_of("metadata")}
        write_text_gguf(self.directory, file, **content, base_type="BF16", embedding_type="BF16", file_type=None)
        return file


@pytest.fixture(scope="module", params=PUBLISHED)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(request.param, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=[name for name in PUBLISHED if name != "CogVLM2"])
def ranked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Those with a vocabulary of tiktoken's."""
    return Small(request.param, tmp_path_factory.mktemp("ranked"))


def test_the_class_that_stands_for_it_computes_the_same(small: Small) -> None:
    _, difference = compare(small.theirs({}), small.authors())
    assert difference <= EXACT


def test_texts_begin_as_the_authors_have_it(small: Small) -> None:
    """Those that calibrate it."""
    tokenizer = small.loaded.prompts.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    begin = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"]) if small.name == "GLM-4V" else bos
    texts = written_texts(small.loaded, 3, 12, 1.0, 0, lambda *_: None)
    assert texts.shape == (3, 12)
    assert texts[:, : len(begin)].tolist() == [begin] * 3
    assert not set(texts[:, len(begin) :].flatten().tolist()) & set(tokenizer.all_special_ids)


QUIRKS: dict[str, list[dict[str, Any]]] = {
    "Qwen-VL": [{"gate": ("mlp.w1", None), "up": ("mlp.w2", None)}, {"qkv_bias": False}],
    "GLM-4V": [
        {"neighbours": False},
        {"turned": 1.0},
        {"base": 10000.0},
        {"gate": ("mlp.dense_h_to_4h", 1), "up": ("mlp.dense_h_to_4h", 0)},
    ],
    "CogVLM2": [{"base": 10000.0}],
}


def test_a_quirk_ignored_would_show(small: Small) -> None:
    for quirk in QUIRKS[small.name]:
        _, difference = compare(small.authors(replace(small.published.graph, **quirk)), small.authors())
        assert difference > BF16, quirk


def test_a_conversion_gives_one_file_with_the_authors_logits(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = convert(ConvertOptions(small.directory, out, type="BF16", language_model_only=True), Console(quiet=True))
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert report.mmproj is None
    assert read_header(out).metadata["general.architecture"] == GGUF[small.name]
    top1, difference = compare(small.ours(out), small.authors())
    assert top1 >= 0.97
    assert difference <= BF16


@pytest.mark.parametrize("type_name", QUANTISED)
def test_quantised_is_hugging_face_with_those_weights(small: Small, type_name: str) -> None:
    result = quantise(small.loaded, [], replace(SETTINGS, type_name=type_name))
    assert len(result.quantised) == len(list(small.loaded.decoder.linears()))
    _, difference = compare(small.ours(small.written(type_name, result)), small.theirs(unpacked(result)))
    assert difference <= QUANTISED[type_name]


def test_rotated_is_hugging_faces(small: Small) -> None:
    """Fully, as W4A8 is unless told, gate and up in one matrix included."""
    result = quantise(small.loaded, [], replace(SETTINGS, type_name="Q8_0", rotate="full", rounding="nearest"))
    _, difference = compare(small.ours(small.written("rotated", result)), small.theirs({}))
    assert difference <= INT8


def test_the_command_calibrates_on_texts_and_writes_one_file(small: Small, tmp_path: Path) -> None:
    arguments = ["convert", str(small.directory), str(tmp_path / "out.gguf"), "--language-model-only", "--synthetic", "4", "--type", "W4A8"]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0, dry.output
    assert not any(tmp_path.iterdir())
    ended = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert "it has seen no picture tokens" in " ".join(ended.output.split())
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    metadata = read_header(tmp_path / "out.gguf").metadata
    assert metadata["mbq.rotate"] == "full"
    assert metadata["mbq.calibration.synthetic"] == 4
    small.ours(tmp_path / "out.gguf")


def test_without_the_option_it_is_refused_with_the_way_out(small: Small, tmp_path: Path) -> None:
    ended = CliRunner().invoke(main, ["convert", str(small.directory), str(tmp_path / "out.gguf")])
    assert ended.exit_code != 0
    assert "or give --language-model-only" in " ".join(ended.output.split())


def test_a_vocabulary_of_tiktokens_cuts_as_tiktoken_does(ranked: Small) -> None:
    """Words by its regular expression, then the pair of lowest rank until none is left; a word that is a token stays whole."""
    file = next(ranked.directory / name for name in ("qwen.tiktoken", "tokenizer.model") if (ranked.directory / name).is_file())
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, file.read_text().splitlines())}
    digits = r"\p{N}" if ranked.name == "Qwen-VL" else r"\p{N}{1,3}"
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    expected = []
    for word in regex.findall(words, TEXT):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1 and b"".join(parts) not in ranks:
            pairs = [(ranks.get(parts[place] + parts[place + 1], len(ranks)), place) for place in range(len(parts) - 1)]
            rank, place = min(pairs)
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        expected += [ranks[b"".join(parts)]] if b"".join(parts) in ranks else [ranks[part] for part in parts]
    assert ranked.ids == expected
    assert ranked.loaded.prompts.tokenizer.decode(expected) == TEXT


def spoilt(small: Small, folder: Path, **config: Any) -> Path:
    """A copy of the checkpoint with other settings."""
    shutil.copytree(small.directory, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("Qwen-VL", {"kv_channels": 64}, "kv_channels 64 and only 32 is supported"),
        ("GLM-4V", {"rmsnorm": False}, "rmsnorm False and only True is supported"),
        ("CogVLM2", {"hidden_act": "gelu"}, "hidden_act 'gelu' and only 'silu' is supported"),
    ],
)
def test_other_settings_than_published_ones_are_refused(tmp_path: Path, name: str, config: dict[str, Any], why: str) -> None:
    directory = spoilt(Small(name, tmp_path), tmp_path / "spoilt", **config)
    with pytest.raises(UserError, match=why):
        convert(ConvertOptions(directory, tmp_path / "out.gguf", type="BF16", language_model_only=True), Console(quiet=True))


def test_spoilt_vocabularies_are_refused(ranked: Small, tmp_path: Path) -> None:
    directory = spoilt(ranked, tmp_path / "spoilt")
    file = next(path for path in directory.iterdir() if path.suffix in (".tiktoken", ".model"))
    lines = file.read_text().splitlines()
    for content in ("\x00\x01", "YQ== 0\n", "\n".join([*lines[1:], lines[1]])):
        file.write_text(content)
        with pytest.raises(UserError, match="not a tiktoken vocabulary"), language_only_mode(True):
            load(directory)


def test_a_weight_that_is_missing_is_named(small: Small, tmp_path: Path) -> None:
    directory = spoilt(small, tmp_path / "spoilt")
    tensors = load_file(directory / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(f"{small.published.graph.qkv}.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 3 weights"), language_only_mode(True):
        load(directory)
