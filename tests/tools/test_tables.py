"""docs/results.md shows what the stored rows say: a table edited by hand, or a row that was measured and not written, fails here."""

from __future__ import annotations

import json

import make_divergence
import make_results
import make_wide
import pytest


def shown(which: str) -> list[str]:
    """The lines of tables between the markers of one section."""
    page = make_results.PAGE.read_text(encoding="utf-8")
    section = page.partition(f"<!-- {which} table:")[2].partition(f"<!-- end of {which} table")[0]
    return [line for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("which", ["quality", "divergence", "steps", "wide"])
def test_the_page_is_the_rows(which: str) -> None:
    divergence = json.loads(make_divergence.STORE.read_text(encoding="utf-8"))
    text = {
        "quality": lambda: make_results.render(make_results.load_rows(make_results.TABLE)),
        "divergence": lambda: make_divergence.render_files(divergence),
        "steps": lambda: make_divergence.render_steps(divergence),
        "wide": lambda: make_wide.render(json.loads(make_wide.STORE.read_text(encoding="utf-8"))),
    }[which]()
    assert shown(which) == [line for line in text.splitlines() if line.startswith("|")]
    assert len(shown(which)) > 2


def test_every_divergence_is_of_the_file_that_its_row_tells_of() -> None:
    rows = json.loads(make_divergence.STORE.read_text(encoding="utf-8"))["rows"]
    finished = make_results.load_rows(make_results.TABLE)
    made = {name: row["made"] for name, row in rows.items() if row["made"]}
    assert {"MBQ3", "MBQ3S", "MBQ3 --seed 1"} <= made.keys()
    for name in made:
        assert made[name] == make_divergence.made_at(finished[name]), name
