"""The figures of an evaluation as rows of text, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mbq_gguf.evaluate.results import Evaluation, FileResult, Spread

NOTHING = "–"


@dataclass(frozen=True)
class Grid:
    """A table: the first cell of each row names a file."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def grids(evaluation: Evaluation) -> list[Grid]:
    """Every table of the evaluation."""
    found = [overview(evaluation), by_class(evaluation), by_task(evaluation)]
    found += [on_text(evaluation)] if evaluation.text else []
    static = any(file.clipped or (file.text and file.text.clipped) for file in evaluation.files)
    return [*found, by_range(evaluation)] if static else found


def overview(evaluation: Evaluation) -> Grid:
    """Size and quality, one line per file."""
    headings = ["file", "MB", "bits per weight", "in layers", "exact match, %", "KLD mean", "median", "p99", "same top-1, %", "seconds"]
    rows = []
    for index, file in enumerate(evaluation.files):
        kld = file.divergence
        compared = [NOTHING] * 4 if index == 0 else [with_error(kld), nats(kld.median), nats(kld.p99), percent(file.agreement)]
        sizes = [f"{file.file_bytes / 1e6:.1f}", f"{file.bits_per_weight:.2f}", f"{file.layer_bits_per_weight:.2f}"]
        match = f"{percent(file.exact_match)} ± {percent(file.exact_match_error)}"
        rows.append([file.name, *sizes, match, *compared, f"{file.seconds:.0f}"])
    tokens = evaluation.files[0].divergence.tokens
    title = (
        f"{len(evaluation.questions)} questions, {tokens} answer tokens; KLD in nats against {evaluation.files[0].name}, ± standard error"
    )
    return Grid(title, headings, rows)


def by_class(evaluation: Evaluation) -> Grid:
    """Mean divergence per class of answer tokens."""
    counts = {name: found.tokens for name, found in evaluation.files[0].class_divergence().items()}
    rows = []
    for file in evaluation.files[1:]:
        found = file.class_divergence()
        rows.append([file.name, *(with_error(found[name]) for name in counts)])
    return Grid("mean KLD by class of answer token", ["file", *(f"{name} ({count})" for name, count in counts.items())], rows)


def by_task(evaluation: Evaluation) -> Grid:
    """Exact match per task, in per cent."""
    shares = [(file, evaluation.task_match(file)) for file in evaluation.files]
    rows = [[file.name, *(f"{100 * match[task]:.0f}" for task in evaluation.tasks())] for file, match in shares]
    return Grid("exact match by task, %", ["file", *evaluation.tasks()], rows)


def on_text(evaluation: Evaluation) -> Grid:
    """The text file without pictures."""
    rows = [_text_row(file, index == 0) for index, file in enumerate(evaluation.files) if file.text]
    return Grid(f"text alone: {evaluation.text}", ["file", "KLD mean", "median", "p99", "same top-1, %", "perplexity"], rows)


def by_range(evaluation: Evaluation) -> Grid:
    """What static ranges cut, of files that have them."""
    rows = []
    for file in evaluation.files:
        asked, text = file.clipped, file.text.clipped if file.text else {}
        if asked or text:
            rows.append(
                [file.name, *(_share(asked, kind) for kind in ("text", "vision")), *([_share(text, "text")] if evaluation.text else [])]
            )
    headings = ["file", "text", "vision", *(["text alone"] if evaluation.text else [])]
    return Grid(f"activations beyond their static range, % ({NOTHING}: none had one)", headings, rows)


def _share(clipped: dict[str, float], kind: str) -> str:
    return f"{100 * clipped[kind]:.3g}" if kind in clipped else NOTHING


def _text_row(file: FileResult, is_reference: bool) -> list[str]:
    if file.text is None:
        return [file.name, *[NOTHING] * 5]
    kld = file.text.divergence
    compared = [NOTHING] * 4 if is_reference else [with_error(kld), nats(kld.median), nats(kld.p99), percent(file.text.agreement)]
    return [file.name, *compared, f"{file.text.perplexity:.3f}"]


def nats(value: float) -> str:
    """Three digits, for divergences of any size."""
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def with_error(spread: Spread) -> str:
    """Mean and its standard error."""
    return f"{nats(spread.mean)} ± {spread.error:.1g}" if spread.tokens else NOTHING


def percent(share: float) -> str:
    """Per cent, one digit after the point."""
    return f"{100 * share:.1f}"


def render(parts: Sequence[Grid], console: Console) -> RenderableType:
    """The tables for a terminal; those that are too wide for it stand on their side where that is narrower."""
    return Group(*(min((_rich(part), _rich(transposed(part))), key=lambda table: _excess(table, console)) for part in parts))


def _excess(table: Table, console: Console) -> int:
    return max(0, console.measure(table, options=console.options.update(width=10_000)).maximum - console.width)


def transposed(grid: Grid) -> Grid:
    """Rows as columns."""
    cells = [grid.headings, *grid.rows]
    sides = [list(column) for column in zip(*cells, strict=True)]
    return Grid(grid.title, ["", *sides[0][1:]], sides[1:])


def _rich(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(grid.headings):
        table.add_column(Text(heading), justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
