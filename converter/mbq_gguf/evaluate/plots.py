"""The plots of the report as SVG text for embedding in a page. Does not use pyplot, and so needs no global state or display."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mbq_gguf.evaluate.results import Evaluation, FileResult, Layers

# Okabe and Ito's colour-blind-safe palette; grey is reserved for the reference.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99")
REFERENCE = "#8a8f98"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa0a8",
}
WIDTH = 11.0  # inches: the page's
FLOOR = 1e-7  # nats; the position of an exact copy of the reference on a log axis


def colours(evaluation: Evaluation) -> list[str]:
    """A colour for each file, the same in every plot."""
    return [REFERENCE, *(PALETTE[i % len(PALETTE)] for i in range(len(evaluation.files) - 1))]


def pareto(evaluation: Evaluation) -> str:
    """Mean KLD against file size; the line connects the Pareto-optimal files."""
    candidates = evaluation.files[1:]

    def draw(axes: Axes) -> None:
        points = sorted((file.file_bytes / 1e6, max(file.divergence.mean, FLOOR)) for file in candidates)
        best = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        axes.plot(*zip(*best, strict=True), color="#c3c8cf", linewidth=1.5, zorder=1)
        for file, colour in zip(candidates, colours(evaluation)[1:], strict=True):
            place = (file.file_bytes / 1e6, max(file.divergence.mean, FLOOR))
            axes.errorbar(*place, yerr=min(file.divergence.error, 0.9 * place[1]), fmt="o", color=colour, markersize=7, capsize=3, zorder=2)
            axes.annotate(file.name.removesuffix(".gguf"), place, xytext=(8, 5), textcoords="offset points", color=colour)
        axes.set_yscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel("file size, MB")
        axes.set_ylabel("mean KLD of answer tokens, nats")

    return _svg(draw, WIDTH, 4.4)


def task_bars(evaluation: Evaluation) -> str:
    """Exact match per task, one bar per file."""
    tasks = evaluation.tasks()
    width = 0.8 / len(evaluation.files)

    def draw(axes: Axes) -> None:
        for index, (file, colour) in enumerate(zip(evaluation.files, colours(evaluation), strict=True)):
            match = evaluation.task_match(file)
            places = [position + (index + 0.5) * width - 0.4 for position in range(len(tasks))]
            axes.bar(places, [100 * match[task] for task in tasks], width, color=colour, label=file.name.removesuffix(".gguf"))
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("exact match, %")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)

    return _svg(draw, WIDTH, 4.0)


def error_curves(evaluation: Evaluation) -> str | None:
    """Relative squared error of the weights per layer, None if no file has it."""
    return _curves(evaluation, lambda found: (found.error_attention, found.error_mlp), "relative squared error", logarithmic=True)


def ratio_curves(evaluation: Evaluation) -> str | None:
    """Sensitivity of vision over language tokens per layer (MBQ's ratio), None if no file has it."""
    return _curves(evaluation, lambda found: (found.ratio_attention, found.ratio_mlp), "vision over language", logarithmic=False)


def _curves(
    evaluation: Evaluation, pick: Callable[[Layers], tuple[list[float], list[float]]], label: str, *, logarithmic: bool
) -> str | None:
    shown: list[tuple[FileResult, str]] = [
        (file, colour) for file, colour in zip(evaluation.files, colours(evaluation), strict=True) if any(pick(file.layers))
    ]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for file, colour in shown:
            for values, part, line in zip(pick(file.layers), ("attention", "feed-forward"), ("-", "--"), strict=True):
                name = f"{file.name.removesuffix('.gguf')}, {part}"
                axes.plot(range(len(values)), values, line, color=colour, label=name, linewidth=1.6)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return _svg(draw, WIDTH, 3.6)


def _svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which must not be inside a page
