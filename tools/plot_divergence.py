"""Draws docs/divergence.svg, the README's figure, from docs/results/wide.json: each file's loss over its bits per weight.

    python tools/plot_divergence.py

The model is the widened reference VLM, in which every matrix suits every type.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "results" / "wide.json"
PICTURE = ROOT / "docs" / "divergence.svg"
PANELS = ("scenes", "photographs", "text")
SERIES = ("mbq-gguf", "llama-quantize, our imatrix", "llama-quantize")
STYLES = dict(zip(SERIES, (("#c0392b", "o"), ("#2c6fbb", "s"), ("#8a8a8a", "^")), strict=True))
# In points, labels that would meet others; the second figure is for "scenes", where IQ3_S is below Q3_K_S.
LIFTED = {(SERIES[1], "IQ3_S"): (5, -2), (SERIES[2], "Q3_K_S"): (-4, 4), (SERIES[1], "Q4_K_S"): (-9, -9), (SERIES[0], "MBQ3"): (7, 7)}


@dataclass(frozen=True)
class Point:
    """One file in one panel: KL divergence from BF16 in nats at a size in bits per weight of the decoder's matrices."""

    panel: str
    series: str
    name: str
    bits: float
    divergence: float


def points(rows: dict[str, Any]) -> list[Point]:
    """Every stored file but the reference, in every panel."""
    found = []
    for name, row in rows.items():
        if name == "BF16":
            continue
        series = SERIES[0] if "making" in row else SERIES[1] if name.endswith("+imatrix") else SERIES[2]
        measured = {part: row[part]["divergence"]["mean"] for part in ("scenes", "photographs")}
        measured["text"] = row["scenes"]["text"]["divergence"]["mean"]
        kind = name.removesuffix("+imatrix")
        found += [Point(panel, series, kind, row["scenes"]["layer_bits_per_weight"], measured[panel]) for panel in PANELS]
    return found


def draw(found: list[Point], path: Path) -> None:
    """Write the figure to ``path`` as SVG, with text as text."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "mbq-gguf", "font.size": 9, "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 3.9), layout="constrained", facecolor="white")
        for axes, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
            _panel(axes, panel, [point for point in found if point.panel == panel])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Axes, panel: str, found: list[Point]) -> None:
    for series in SERIES:
        colour, marker = STYLES[series]
        own = [point for point in found if point.series == series]
        axes.scatter([p.bits for p in own], [p.divergence for p in own], color=colour, marker=marker, label=series, zorder=3)
        for point in own:
            right = point.bits < 4
            lift = LIFTED.get((series, point.name), (0, 0))[panel == "scenes"]
            axes.annotate(
                point.name, (point.bits, point.divergence), xytext=(6 if right else -6, lift),
                textcoords="offset points", ha="left" if right else "right", va="center", color=colour, fontsize=8,
            )  # fmt: skip
    axes.set(title=panel, xlabel="bits per weight")
    axes.margins(x=0.1, y=0.1)
    if panel == "scenes":
        axes.set_yscale("log")  # three orders of magnitude; the others begin at nothing lost
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, which="major", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    if panel == PANELS[0]:
        axes.set_ylabel("KL divergence from BF16, nats")


if __name__ == "__main__":
    draw(points(json.loads(ROWS.read_text(encoding="utf-8"))["rows"]), PICTURE)
