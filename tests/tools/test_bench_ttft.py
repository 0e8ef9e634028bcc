"""tools/bench_ttft.py: llama.cpp loads its random models, and its ratios are taken within a round."""

from __future__ import annotations

import re
from pathlib import Path

import bench_request
import bench_tower
import bench_ttft
import numpy as np
import pytest
import random_gguf
from bench_ttft import DEMO, Prompt
from click.testing import CliRunner
from mbq_cbind.model import Model
from mbq_gguf.llama_cpp.bindings import bind
from tokenizers import Tokenizer


def test_random_models_take_pictures_and_words(built_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bind()
    monkeypatch.setattr(random_gguf, "TOWER", (1, 160))
    monkeypatch.setitem(bench_ttft.SHAPES, "2B", random_gguf.LanguageShape(1, 256, 512, 2, 1, 0))
    picture = bench_ttft.noise(tmp_path, 1, 64)[0]
    with bench_ttft.random_model("2B:MBQ3S", tmp_path) as files, Model(*files, threads=1, context=256, aifs=True) as model:
        assert model.apart is None
        image = model.vision.encode(picture)
        assert [len(embedding) for embedding in image.embeddings] == [64]
        words = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(bench_ttft.QUESTION).ids
        assert model.tokenize(bench_ttft.QUESTION) == words
        assert np.isfinite(model.logits(model.prompt("What?"), [image], [1])).all()
    assert not files[0].exists()


def test_towers_of_every_type_are_timed(built_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bind()
    monkeypatch.setattr(random_gguf, "TOWER", (1, 160))
    monkeypatch.setattr(bench_tower, "SIDES", {64: 224})
    monkeypatch.setitem(bench_ttft.SHAPES, "2B", random_gguf.LanguageShape(1, 256, 512, 2, 1, 0))
    kinds = ["F16", "Q8_0", "W8A8", "W4A8"]
    times = bench_tower.towers(tmp_path, kinds, [64], 256, 2, {"threads": 1})
    assert {key: len(found) for key, found in times.items()} == {(kind, 64): 2 for kind in kinds}
    language = bench_tower.languages(tmp_path, ["2B:W4A8"], [64], 1, {"threads": 1})
    assert bench_tower.together(times, language).row_count == len(kinds)


@pytest.mark.parametrize("arguments", [["--towers", ""], ["--towers", "F16,Q9_9"], ["--towers", "F16:dynamic"], ["--language", "7B"]])
def test_names_without_a_random_model_are_refused_before_any_is_made(arguments: list[str]) -> None:
    result = CliRunner().invoke(bench_tower.main, arguments)
    assert result.exit_code == 2
    assert f"there is no {arguments[1].split(',')[-1]!r}: choose of " in result.output


def test_ratios_are_within_a_round_and_the_first_of_it_alternates() -> None:
    order: list[str] = []
    seconds = {"off": iter([9.0, 2.0, 4.0, 8.0]), "on": iter([9.0, 1.0, 1.0, 8.0])}

    def run(mode: str, _: Prompt) -> float:
        order.append(mode)
        return next(seconds[mode])

    (row,) = bench_ttft.summary("m", "c", "apart", bench_ttft.interleaved([Prompt((), "?")], ("off", "on"), 3, run, "title"))
    assert order == ["off", "on", *("on", "off"), *("off", "on"), *("on", "off")]  # the first two warm up
    assert (row.before, row.mode) == ("off", "on")
    assert (row.ratio, row.least, row.greatest, row.before_ms, row.mode_ms) == (2.0, 1.0, 4.0, 4000.0, 1000.0)


def test_a_request_is_taken_apart(
    built_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bind()
    monkeypatch.setattr(random_gguf, "TOWER", (1, 160))
    monkeypatch.setattr(bench_request, "SIDES", {64: 224})
    monkeypatch.setattr(bench_request, "RANDOM_CASES", ((2, 64),))
    monkeypatch.setattr(bench_request, "BLOCKS", (1,))
    monkeypatch.setitem(bench_ttft.SHAPES, "2B", random_gguf.LanguageShape(1, 256, 512, 2, 1, 0))
    assert bench_request.main.main(["--rounds", "2"], standalone_mode=False) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["64 tokens, 1 blocks", "2 x 64"]
    assert all(part in lines[0] for part in ("read", "preprocessed", "tower"))
    whole, slot, rest = (float(number) for number in re.findall(r"\d+\.\d", lines[-1]))
    assert whole >= slot > 0
    assert rest > 0
