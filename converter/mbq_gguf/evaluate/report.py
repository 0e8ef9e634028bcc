"""One self-contained HTML page: tables, plots, and the questions with the largest divergence, with their pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, UnidentifiedImageError

from mbq_gguf import __version__
from mbq_gguf.evaluate import plots
from mbq_gguf.evaluate.results import Answer, Evaluation
from mbq_gguf.evaluate.table import Grid, grids, nats, transposed

WORST = 10  # questions shown per file
WIDE = 13  # columns; a table with this many is transposed
PICTURE_SIDE = 320  # pixels, the longer side of a picture in the page


@dataclass(frozen=True)
class Case:
    """A question on which a file and the reference differ."""

    picture: str  # data URI
    question: str
    task: str
    expected: str
    reference: str
    given: str
    divergence: str


def render(evaluation: Evaluation) -> str:
    """The page as HTML text; it loads no external resources."""
    candidates = evaluation.files[1:]
    figures = {
        "Divergence against size": plots.pareto(evaluation),
        "Exact match by task": plots.task_bars(evaluation),
        "Error of the weights by layer": plots.error_curves(evaluation),
        "Sensitivity ratio by layer": plots.ratio_curves(evaluation),
    }
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mbq_gguf.evaluate", "."), autoescape=True)
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        version=__version__,
        grids=[grid if len(grid.headings) < WIDE else transposed(grid) for grid in map(_without_suffix, grids(evaluation))],
        figures={title: svg for title, svg in figures.items() if svg is not None},
        changes=[(_stem(file.name), [_case(evaluation, answer) for answer in evaluation.worst(file, WORST)]) for file in candidates],
    )


def _without_suffix(grid: Grid) -> Grid:
    return Grid(grid.title, grid.headings, [[_stem(row[0]), *row[1:]] for row in grid.rows])


def _stem(name: str) -> str:
    return name.removesuffix(".gguf")


def _case(evaluation: Evaluation, answer: Answer) -> Case:
    asked = evaluation.questions[answer.question]
    return Case(
        picture=_data_uri(Path(asked.image)),
        question=asked.question,
        task=asked.task,
        expected=asked.expected.strip(),
        reference=evaluation.files[0].answers[answer.question].given,
        given=answer.given,
        divergence=nats(float(np.mean(answer.divergence))),
    )


def _data_uri(path: Path) -> str:
    """The picture, scaled down to its size on the page; "" if it cannot be read any more."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return ""
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
