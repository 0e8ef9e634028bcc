"""Summaries of an evaluation, its tables, and its page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mbq_gguf.evaluate.classes import DIGITS, END, WORDS
from mbq_gguf.evaluate.report import render as render_page
from mbq_gguf.evaluate.results import Answer, Asked, Evaluation, FileResult, Layers, TextResult, short_names, spread
from mbq_gguf.evaluate.table import grids, nats, render
from PIL import Image
from rich.console import Console


def file(name: str, answers: list[Answer], layers: Layers | None = None, size: int = 1000) -> FileResult:
    text = TextResult(spread([[0.5, 1.5]]), 0.75, 12.5)
    return FileResult(name, f"/models/{name}", size, 4.5, 3.5, 7.0, answers, text, layers or Layers())


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    picture = tmp_path / "scene.png"
    Image.new("RGB", (500, 250), "teal").save(picture)
    classes = [DIGITS, WORDS, END]
    exact = [Answer(i, "7 <b>", True, [0.0] * 3, [True] * 3, classes) for i in range(3)]
    worse = [
        Answer(0, "7 <b>", True, [0.0, 0.3, 0.0], [True] * 3, classes),
        Answer(1, "8", False, [3.0, 0.0, 0.0], [False, True, True], classes),
        Answer(2, "9", False, [0.6, 0.0, 0.0], [False, True, True], classes),
    ]
    asked = [Asked(str(picture), f"How many at {i}?", "7 <b>", "count" if i else "exist") for i in range(3)]
    layers = Layers([1.0, 0.5], [0.4, 0.2], [0.01, 0.02], [0.03, 0.04])
    files = [file("BF16.gguf", exact, size=4000), file("Q3.gguf", worse, layers), file("Q4.gguf", exact, size=2000)]
    return Evaluation("eval.jsonl", "mmproj.gguf", "text.txt", asked, files)


def test_spread_by_hand() -> None:
    found = spread([[0.0, 1.0], [2.0]])
    assert (found.tokens, found.mean, found.median) == (3, 1.0, 1.0)
    assert found.error == pytest.approx(np.sqrt(2 * ((1 - 2) ** 2 + (2 - 1) ** 2)) / 3)
    assert found.p99 == pytest.approx(1.98)


def test_spread_of_nothing() -> None:
    assert spread([]).tokens == spread([[], []]).tokens == 0


def test_error_of_the_mean_covers_the_truth() -> None:
    """Tokens of one answer share their luck: the naive error would be three times too small."""
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(200):
        found = spread(np.repeat(random.exponential(size=(50, 1)), 9, axis=1))
        means.append(found.mean)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_summaries(evaluation: Evaluation) -> None:
    worse = evaluation.files[1]
    assert worse.exact_match == pytest.approx(1 / 3)
    assert worse.agreement == pytest.approx(7 / 9)
    assert worse.divergence.mean == pytest.approx(3.9 / 9)
    assert evaluation.task_match(worse) == {"count": 0.0, "exist": 1.0}
    assert {name: found.mean for name, found in worse.class_divergence().items()} == pytest.approx({WORDS: 0.1, DIGITS: 1.2, END: 0.0})


def test_the_worst_come_first(evaluation: Evaluation) -> None:
    assert [answer.question for answer in evaluation.worst(evaluation.files[1], 2)] == [1, 2]
    assert evaluation.worst(evaluation.files[2], 9) == []


def test_json_holds_answers_and_summaries(evaluation: Evaluation) -> None:
    document = json.loads(evaluation.to_json())
    assert document["files"][1]["answers"][1]["given"] == "8"
    assert document["files"][1]["summary"]["exact_match_by_task"] == {"count": 0.0, "exist": 1.0}
    assert document["files"][1]["summary"]["divergence"]["p99"] == pytest.approx(np.percentile([3.0, 0.6, 0.3] + [0.0] * 6, 99))


def test_every_grid_is_rectangular_and_shown(evaluation: Evaluation) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(grids(evaluation), console))
    shown = console.export_text()
    for grid in grids(evaluation):
        assert all(len(row) == len(grid.headings) for row in grid.rows)
        assert grid.title in shown
    assert "33.3 ± 27.2" in shown


@pytest.mark.parametrize(("width", "upright"), [(160, True), (60, False)])
def test_tables_turn_where_the_terminal_is_narrow(evaluation: Evaluation, width: int, upright: bool) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(grids(evaluation)[:1], console))
    lines = console.export_text().splitlines()
    assert any(line.split()[:2] == ["Q3.gguf", "0.0"] for line in lines) is upright
    assert any(line.split()[:4] == ["MB", "0.0", "0.0", "0.0"] for line in lines) is not upright


class Page(HTMLParser):
    """Collects what a browser would load, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing(evaluation: Evaluation) -> None:
    text = render_page(evaluation)
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert "url(http" not in text
    assert text.count("<svg") == 4
    assert "7 &lt;b&gt;" in text
    assert "<b>" not in text


def test_a_page_without_curves_or_pictures(evaluation: Evaluation) -> None:
    for asked in evaluation.questions:
        Path(asked.image).unlink(missing_ok=True)
    plain = Evaluation("d", "m", None, evaluation.questions, [evaluation.files[0], evaluation.files[2]])
    text = render_page(plain)
    assert text.count("<svg") == 2
    assert "<img" not in text


def test_names_tell_files_apart() -> None:
    assert short_names([Path("/a/x.gguf"), Path("/b/y.gguf")]) == ["x.gguf", "y.gguf"]
    assert short_names([Path("/a/x.gguf"), Path("/b/x.gguf")]) == ["a/x.gguf", "b/x.gguf"]
    assert len(short_names([Path("/a/x.gguf"), Path("/a/x.gguf")])) == 2


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (0.01234, "0.0123"), (2.5, "2.5"), (3.21e-6, "3.2e-06")])
def test_nats(value: float, shown: str) -> None:
    assert nats(value) == shown
