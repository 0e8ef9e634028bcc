"""A whole comparison of small random VLMs in real GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mbq_cbind.model import Model
from mbq_gguf.cli import main
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.evaluate.command import eval_command
from mbq_gguf.evaluate.exact_match import MAX_TOKENS, SHIPPED, load_questions
from mbq_gguf.evaluate.kld import Store, divergence
from mbq_gguf.evaluate.layers import WeightFile, fitted, weight_errors
from mbq_gguf.evaluate.measure import Evaluator, Ledger
from mbq_gguf.evaluate.results import Answer, Evaluation
from mbq_gguf.evaluate.run import EvalOptions, evaluate
from mbq_gguf.evaluate.table import NOTHING, grids
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.formats.mbq3 import MBQ3_64
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.models import load
from rich.console import Console
from static_files import keys, with_keys, write_plain

STORED = 0.5 * (2.0**-8) ** 2  # nats: what float16 storage of the reference adds to a divergence of zero (test_kld.py)
WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


@dataclass(frozen=True)
class Files:
    reference: Path
    rounded: Path
    mmproj: Path
    data: Path
    text: Path

    def options(self, *candidates: Path, text: bool = False) -> EvalOptions:
        return EvalOptions(self.reference, candidates, self.mmproj, self.data, self.text if text else None, threads=2, context=1024)


@pytest.fixture(scope="module")
def files(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("eval")
    found = Files(*(folder / name for name in ("bf16.gguf", "mbq3.gguf", "mmproj.gguf", "data.jsonl", "text.txt")))
    loaded = load(tiny_dir)
    loaded.hold()
    parameters = dict(loaded.decoder.module.named_parameters())
    quantised = {
        key: QuantisedTensor("MBQ3_64", MBQ3_64.quantize(weight.float().numpy()), weight.shape[1])
        for key, weight in parameters.items()
        if key.startswith("layers.") and weight.ndim == 2
    }
    ratios = {"mbq.ratio.attention": [1.0, 0.5, 0.25], "mbq.ratio.mlp": [0.9, 0.4, 0.2]}
    for path, tensors, metadata in ((found.reference, {}, {}), (found.rounded, quantised, ratios)):
        write_text_gguf(
            tiny_dir, path, quantised=tensors, replaced={}, base_type="BF16", embedding_type="BF16", metadata=metadata, file_type=None
        )
    write_mmproj_gguf(tiny_dir, found.mmproj, mmproj_type="F16")
    lines = SHIPPED.read_text().splitlines()[:3]
    scenes = [json.loads(line) | {"image": str(SHIPPED.parent / json.loads(line)["image"])} for line in lines]
    scenes[0]["turns"].append({"question": "Is it red?", "answer": "no", "task": "exist"})
    found.data.write_text("".join(json.dumps(scene) + "\n" for scene in scenes))
    found.text.write_text(WORDS)
    return found


@pytest.fixture(scope="module")
def evaluation(files: Files) -> Evaluation:
    return evaluate(files.options(files.rounded, files.reference, text=True), Console(quiet=True))


def test_the_reference_beside_itself(evaluation: Evaluation) -> None:
    reference, _, again = evaluation.files
    assert reference.divergence.mean == 0
    assert again.divergence.tokens == reference.divergence.tokens
    assert max(max(answer.divergence) for answer in again.answers) <= STORED
    assert again.agreement == 1
    assert [a.given for a in again.answers] == [a.given for a in reference.answers]
    assert again.layers.error_mlp == pytest.approx([0, 0, 0], abs=1e-12)


def test_divergence_is_that_of_the_logits(evaluation: Evaluation, files: Files) -> None:
    """One question by hand, through the models alone."""
    question = load_questions(files.data)[1]
    logits = []
    for path in (files.reference, files.rounded):
        with Model(path, files.mmproj, threads=2, context=1024) as model:
            answer = [*model.tokenize(question.expected), model.end_of_answer]
            logits.append(model.logits(model.prompt(question.question), [model.vision.encode(question.image)], answer))
    expected = divergence(logits[0], logits[1])
    measured = evaluation.files[1].answers[1]
    assert measured.divergence == pytest.approx(expected.tolist(), rel=0.01, abs=STORED)
    assert measured.agrees == (logits[0].argmax(-1) == logits[1].argmax(-1)).tolist()
    assert expected.max() > 100 * STORED


def test_greedy_answers_are_the_models(evaluation: Evaluation, files: Files) -> None:
    with Model(files.rounded, files.mmproj, threads=2, context=1024) as model:
        for asked, answer in zip(load_questions(files.data), evaluation.files[1].answers, strict=True):
            tokens = model.generate(model.prompt(asked.question), [model.vision.encode(asked.image)], limit=MAX_TOKENS)
            assert answer.given == model.text(tokens).strip()


def test_text_alone(evaluation: Evaluation) -> None:
    reference, rounded, again = (file.text for file in evaluation.files)
    assert reference is not None
    assert rounded is not None
    assert again is not None
    assert reference.divergence.tokens == rounded.divergence.tokens == 256
    assert again.divergence.mean <= STORED < rounded.divergence.mean
    assert again.perplexity == pytest.approx(reference.perplexity)


def test_layers_and_sizes(evaluation: Evaluation, files: Files) -> None:
    rounded = evaluation.files[1]
    assert rounded.layer_bits_per_weight == pytest.approx(3.5)
    assert rounded.file_bytes == files.rounded.stat().st_size
    assert rounded.layers.ratio_attention == [1.0, 0.5, 0.25]
    # uniform noise of a 3-bit grid over the range of 64 normal values, some 4.7 sigma: (4.7 / 7)^2 / 12
    assert rounded.layers.error_attention == pytest.approx([0.037] * 3, rel=0.15)


def test_folded_factors_are_no_error(files: Files) -> None:
    random = np.random.default_rng(0)
    original = random.normal(size=(64, 96))
    folded = original * np.exp(random.normal(size=(64, 1))) * np.exp(random.normal(size=(1, 96)))
    assert fitted(folded, original) == pytest.approx(original, rel=1e-3)
    itself = WeightFile(files.reference, read_header(files.reference))
    assert weight_errors(itself, itself)["attn"] == pytest.approx([0] * 3, abs=1e-12)


def test_a_rotated_file_reads_pictures_through_its_own_part(files: Files, tiny_dir: Path, tmp_path: Path) -> None:
    chosen = ConvertOptions(
        tiny_dir, tmp_path / "turned.gguf", type="Q8_0", method="rtn", rounding="nearest", mmproj_type="F32", rotate="offline"
    )
    convert(chosen, Console(quiet=True))
    _, turned = evaluate(files.options(chosen.out), Console(quiet=True)).files
    assert turned.divergence.mean < 0.01  # what Q8_0 does to this model; measured 0
    chosen.mmproj.unlink()
    with pytest.raises(UsageError, match=r"rotated .*mmproj-turned.gguf, which is missing"):
        evaluate(files.options(chosen.out), Console(quiet=True))


def test_what_static_ranges_cut(files: Files, tiny_dir: Path, tmp_path: Path) -> None:
    """A range that holds nothing: all of the text is cut, but for its first row; questions, of 64 rows at once at most, have none."""
    path = write_plain(tiny_dir, tmp_path / "static.gguf")
    metadata = keys(0.0, 0.0, positions=[0]) | {"mbq.act.range.qkv.text": [1e-20, 0.0, 0.0]}
    path.write_bytes(with_keys(path.read_bytes(), metadata))
    found = evaluate(replace(files.options(path, text=True), count=1), Console(quiet=True))
    file = found.files[1]
    assert file.text is not None
    assert (file.clipped, file.text.clipped) == ({}, {"text": 1.0})
    (grid,) = [grid for grid in grids(found) if "beyond their static range" in grid.title]
    assert grid.rows == [["static.gguf", NOTHING, NOTHING, "100"]]
    written = json.loads(found.to_json())["files"]
    assert [entry["text"]["clipped"] for entry in written] == [{}, {"text": 1.0}]
    assert written[1]["summary"]["clipped"] == {}


def test_a_question_without_an_answer_gets_the_references(files: Files, tmp_path: Path) -> None:
    data = tmp_path / "open.jsonl"
    scene = json.loads(files.data.read_text().splitlines()[0])
    data.write_text(json.dumps({"image": scene["image"], "turns": [{"question": "What is this?"}]}))
    options = EvalOptions(files.reference, [files.rounded], files.mmproj, data, threads=2, context=1024)
    found = evaluate(options, Console(quiet=True))
    assert found.files[0].answers[0].right
    assert found.questions[0].expected.strip() == found.files[0].answers[0].given
    assert all(found.files[0].answers[0].agrees)


def test_the_command_writes_table_json_and_page(files: Files, tmp_path: Path) -> None:
    out, page = tmp_path / "eval.json", tmp_path / "eval.html"
    call = [files.reference, files.rounded, "--mmproj", files.mmproj, "--data", files.data, "--questions", 2]
    call += ["--context", 1024, "--threads", 2, "--out", out, "--html", page]
    result = CliRunner().invoke(eval_command, [str(part) for part in call], catch_exceptions=False)
    assert result.exit_code == 0
    assert "mbq3.gguf" in result.stdout
    assert json.loads(out.read_text())["files"][1]["name"] == "mbq3.gguf"
    assert "data:image/png;base64," in page.read_text()
    assert not out.with_name("eval.json.work").exists()


def test_the_vision_file_beside_the_reference_is_found(files: Files, tmp_path: Path) -> None:
    reference = tmp_path / "bf16.gguf"
    reference.symlink_to(files.reference)
    call = ["eval", reference, files.rounded, "--data", files.data, "--questions", 1, "--context", 1024, "--threads", 2]
    ended = CliRunner().invoke(main, [str(part) for part in call])
    assert ended.exit_code == 2
    assert "there is no vision file" in ended.stderr
    (tmp_path / "mmproj-bf16.gguf").symlink_to(files.mmproj)
    ended = CliRunner().invoke(main, [str(part) for part in call])
    assert ended.exit_code == 0, ended.output
    assert "mbq3.gguf" in ended.stdout


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_what_is_read_is_not_written_over(option: str, files: Files, tmp_path: Path) -> None:
    for file in (files.reference, files.rounded, files.mmproj, files.data):
        (tmp_path / "linked").unlink(missing_ok=True)
        (tmp_path / "linked").symlink_to(file)
        before = file.stat().st_mtime_ns
        call = ["eval", files.reference, files.rounded, "--mmproj", files.mmproj, "--data", files.data, option, tmp_path / "linked"]
        ended = CliRunner().invoke(main, [str(part) for part in call])
        assert ended.exit_code == 2
        assert "linked is one of the input files" in ended.stderr
        assert file.stat().st_mtime_ns == before


def test_one_name_for_two_outputs(files: Files, tmp_path: Path) -> None:
    call = ["eval", files.reference, files.rounded, "--mmproj", files.mmproj, "--out", tmp_path / "a", "--html", tmp_path / "a"]
    ended = CliRunner().invoke(main, [str(part) for part in call])
    assert ended.exit_code == 2
    assert "--out and --html are both" in ended.stderr


def test_a_stopped_run_goes_on(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second candidate: started again, the first is not asked once more, and nothing else differs."""
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(files.rounded.read_bytes())
    options = replace(files.options(files.rounded, copy), count=1, work=tmp_path / "work")
    asked: list[str] = []
    whole = Evaluator.answers

    def answers(self: Evaluator, model: Model, advance: Callable[[], None]) -> list[Answer]:
        asked.append(model.path.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, model, advance)

    monkeypatch.setattr(Evaluator, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, Console(quiet=True))
    resumed = evaluate(options, Console(quiet=True))
    assert asked == ["bf16.gguf", "mbq3.gguf", "copy.gguf", "bf16.gguf", "copy.gguf"]
    assert resumed.files[1].answers == resumed.files[2].answers
    evaluate(replace(options, context=1025), Console(quiet=True))  # nothing that was found holds for another setting
    assert asked[5:] == ["bf16.gguf", "mbq3.gguf", "copy.gguf"]
    again = evaluate(replace(options, candidates=[files.reference]), Console(quiet=True))  # as a candidate it is asked, and not found
    assert asked[8:] == ["bf16.gguf", "bf16.gguf"]
    assert again.files[1].divergence.mean <= STORED


def test_files_of_two_tokenisers(tmp_path: Path) -> None:
    ledger, logits = Ledger(Store(tmp_path)), np.zeros((2, 10), np.float32)
    assert ledger.compare("a", [1, 2], logits).divergence == [0, 0]
    assert ledger.compare("a", [1, 2], logits + 1).agrees == [True, True]
    for tokens, other in (([1, 3], logits), ([1, 2], np.zeros((2, 11), np.float32))):
        with pytest.raises(UserError, match="different tokenisers"):
            ledger.compare("a", tokens, other)


def test_a_damaged_candidate_is_found_first(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "short.gguf"
    other.write_bytes(files.reference.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"short\.gguf"):
        evaluate(files.options(other), Console(quiet=True))


def test_text_that_is_too_short(files: Files, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    options = EvalOptions(files.reference, [], files.mmproj, files.data, tmp_path / "short.txt", threads=2, context=1024)
    with pytest.raises(UsageError, match="give a file with at least 512"):
        evaluate(options, Console(quiet=True))


def test_a_picture_that_does_not_fit_is_found_first(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of picture, and a question of some 700 words in a context of 512."""
    scene = json.loads(files.data.read_text().splitlines()[0])
    line = {"image": scene["image"], "turns": [{"question": "What? " * 300, "answer": "one"}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr(Evaluator, "answers", lambda *_: pytest.fail("a question was asked"))
    options = replace(files.options(files.rounded), data=tmp_path / "long.jsonl", context=512)
    with pytest.raises(UsageError, match=r"needs \d+ tokens of a context of 512: give --context 1024"):
        evaluate(options, Console(quiet=True))


def test_a_picture_that_cannot_be_read_is_found_first(files: Files, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"no picture")
    line = {"image": "cut.png", "turns": [{"question": "What?", "answer": "one"}]}
    (tmp_path / "cut.jsonl").write_text(files.data.read_text() + json.dumps(line))
    with pytest.raises(UserError, match=r"cut\.png cannot be read"):
        evaluate(replace(files.options(files.rounded), data=tmp_path / "cut.jsonl"), Console(quiet=True))
