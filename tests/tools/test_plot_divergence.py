"""tools/plot_divergence.py: the figure shows the stored rows, and the one in docs/ is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plot_divergence as plot

ROWS = json.loads(plot.ROWS.read_text(encoding="utf-8"))["rows"]


def test_every_file_is_in_every_panel_with_its_own_figures() -> None:
    found = plot.points(ROWS)
    assert len(found) == len(plot.PANELS) * (len(ROWS) - 1)
    [ours] = [point for point in found if (point.panel, point.series, point.name) == ("photographs", "mbq-gguf", "Q3_K")]
    assert ours.divergence == ROWS["Q3_K"]["photographs"]["divergence"]["mean"]
    assert ours.bits == ROWS["Q3_K"]["scenes"]["layer_bits_per_weight"] == 3.4375
    [stock] = [point for point in found if (point.panel, point.series, point.name) == ("scenes", "llama-quantize, our imatrix", "Q3_K_S")]
    assert stock.divergence == ROWS["Q3_K_S+imatrix"]["scenes"]["divergence"]["mean"]


def marks(path: Path) -> list[tuple[str, str]]:
    """Where each marker of an SVG lies."""
    return re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*style="fill', path.read_text(encoding="utf-8"))


def test_the_picture_in_docs_is_of_the_stored_rows(tmp_path: Path) -> None:
    plot.draw(plot.points(ROWS), tmp_path / "again.svg")
    drawn, kept = ([(float(x), float(y)) for x, y in marks(path)] for path in (tmp_path / "again.svg", plot.PICTURE))
    assert len(drawn) >= len(plot.points(ROWS))
    assert len(drawn) == len(kept)
    for here, there in zip(drawn, kept, strict=True):  # another release of matplotlib may lay a panel out a little differently
        assert abs(here[0] - there[0]) < 6
        assert abs(here[1] - there[1]) < 6
