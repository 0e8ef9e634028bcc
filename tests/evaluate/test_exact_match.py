"""Sets of questions, scores, and the reference VLM's answers through a real server."""

from __future__ import annotations

from collections import Counter
from math import ceil, floor, isclose, sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.evaluate.exact_match import SHIPPED, ExactMatch, GradedAnswer, Question, Score, exact_match, load_questions, stratified
from rich.console import Console


def test_the_shipped_set_has_36_questions_of_each_of_17_tasks() -> None:
    counts = Counter(question.task for question in load_questions(SHIPPED))
    assert len(counts) == 17
    assert set(counts.values()) == {36}


def test_several_turns_become_several_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    line = '{"image": "a.png", "turns": [{"question": "Q1", "answer": "one"}, {"question": "Q2", "answer": "two", "task": "count"}]}'
    (tmp_path / "set.jsonl").write_text(f"\n{line}\n\n", encoding="utf-8")
    image = tmp_path / "a.png"
    assert load_questions(tmp_path / "set.jsonl") == [Question(image, "Q1", "one", "all"), Question(image, "Q2", "two", "count")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("not JSON", "line 2: Invalid JSON"),
        ('{"image": "a.png"}', "line 2: turns: Field required"),
        ('{"image": "a.png", "turns": []}', "line 2: turns: List should have at least 1 item"),
        ('{"image": "a.png", "turns": [{"question": "Q", "answer": 7}]}', "line 2: turns.0.answer: Input should be a valid string"),
        ('{"image": "a.png", "turns": [{"question": "Q", "answer": "A", "tsak": "x"}]}', "line 2: turns.0.tsak: Extra inputs"),
        ('{"image": "b.png", "turns": [{"question": "Q", "answer": "A"}]}', "line 2: the image "),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    good = '{"image": "a.png", "turns": [{"question": "Q", "answer": "A"}]}'
    path = tmp_path / "set.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load_questions(path)
    assert f"{path}, {sentence}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff"])
def test_a_set_that_is_missing_empty_or_no_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "set.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"set\.jsonl"):
        load_questions(path)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 40))
def test_a_stratified_subset_keeps_order_and_balances_tasks(tasks: list[str], count: int) -> None:
    questions = [Question(Path(str(i)), "Q", "A", task) for i, task in enumerate(tasks)]
    subset = stratified(questions, count)
    assert len(subset) == min(count, len(questions))
    assert [int(q.image.name) for q in subset] == sorted(int(q.image.name) for q in subset)
    taken, offered = Counter(q.task for q in subset), Counter(tasks)
    most = max(taken.values(), default=0)
    assert all(taken[task] >= min(offered[task], most - 1) for task in offered)


def test_a_subset_of_the_shipped_set_has_equal_shares() -> None:
    counts = Counter(question.task for question in stratified(load_questions(SHIPPED), 100))
    assert set(counts.values()) == {floor(100 / 17), ceil(100 / 17)}


def test_white_space_around_an_answer_does_not_matter_but_everything_else_does() -> None:
    given_answers = ["one", "One", "one.", "on", ""]
    assert [GradedAnswer("a.png", "count", "Q", " one ", given).right for given in given_answers] == [True, False, False, False, False]


def test_standard_error_is_the_binomial_one() -> None:
    score = Score(asked=400, right=320)
    assert score.share == 0.8
    assert isclose(score.standard_error, sqrt(0.8 * 0.2 / 400))
    assert Score(36, 36).standard_error == 0


@given(st.lists(st.builds(GradedAnswer, *[st.text() for _ in range(5)]), min_size=1, max_size=5), st.floats(0, 1e6))
def test_a_result_survives_json(answers: list[GradedAnswer], seconds: float) -> None:
    result = ExactMatch("model.gguf", seconds, answers)
    again = ExactMatch.from_json(result.to_json())
    assert again == result
    assert sum(score.asked for score in again.tasks.values()) == again.total.asked == len(answers)
    assert sum(score.right for score in again.tasks.values()) == again.total.right


@pytest.fixture(scope="session")
def reference_bf16(reference_dir: Path, built_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertOptions:
    options = ConvertOptions(reference_dir, tmp_path_factory.mktemp("bf16") / "reference.gguf", type="BF16")
    convert(options, Console(stderr=True))
    return options


def test_the_reference_vlm_answers_one_question_of_each_task(reference_bf16: ConvertOptions) -> None:
    questions = stratified(load_questions(SHIPPED), 17)
    result = exact_match(reference_bf16.out, reference_bf16.mmproj, questions, threads=2)
    assert result.model == "reference.gguf"
    assert [(a.image, a.question, a.expected) for a in result.answers] == [(q.image.name, q.question, q.expected) for q in questions]
    # 0.990 of the whole set are right in BF16; two wrong answers of 17 would already be unlike it (p = 0.01).
    assert result.total.right >= 16
    assert result.seconds > 0


def test_a_picture_that_is_none_stops_the_run(reference_bf16: ConvertOptions, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    question = Question(tmp_path / "broken.png", "What is this?", "nothing", "all")
    with pytest.raises(UserError, match=r"broken\.png"):
        exact_match(reference_bf16.out, reference_bf16.mmproj, [question], threads=2)
