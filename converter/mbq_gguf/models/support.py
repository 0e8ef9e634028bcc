"""Which features work with which family, from the tables of families and layouts: for a terminal, as JSON, and for docs/families.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table

from mbq_gguf.models.families import FAMILIES, IN_TURNS, LANGUAGE_ALONE, REFUSED, Family
from mbq_gguf.models.layouts import layout_of

WORKS = "yes"
ALONE_TITLE = "alone: whether the language model converts by itself (--language-model-only)"


@dataclass(frozen=True)
class Support:
    """A family, and for each feature the reason why it does not work, or None."""

    family: str
    architectures: tuple[str, ...]
    gguf: str
    limits: dict[str, str | None]

    def cell(self, column: str) -> str:
        """The table's entry: yes or no."""
        return "no" if self.limits[column] else WORKS


def support() -> list[Support]:
    """All supported families, in the order of the table."""
    return [Support(family.name, family.architectures, family.gguf, limits(family)) for family in FAMILIES]


def limits(family: Family) -> dict[str, str | None]:
    """For each feature, why it does not work with ``family``, or None. The layout decides, and for one pass the runtime."""
    layout = layout_of(family.architectures[0])
    return {
        "calibration": None,
        "W3": None,
        "W4A8": None,
        "equalisation": layout.no_equalisation(),
        "rotation": layout.no_rotation(),
        "mmproj": None,
        "one pass": IN_TURNS.get(family.gguf),
        **family.limits,
    }


def as_json() -> dict[str, Any]:
    """The same for programs. "refused" has the refused architectures with reasons, "language_alone" those of which only the language
    model converts."""
    return {"families": [asdict(found) for found in support()], "refused": REFUSED, "language_alone": LANGUAGE_ALONE}


def reasons() -> list[str]:
    """One sentence for each "no" in the table."""
    return [f"{found.family}, {name}: {why}." for found in support() for name, why in found.limits.items() if why]


def table() -> RenderableType:
    """Families and refusals, for terminals of 80 columns or more."""
    found = support()
    columns = list(found[0].limits)
    headers = [Column(name, overflow="fold") for name in ("family", "llama.cpp", *columns)]
    families = Table(*headers, box=box.SIMPLE_HEAD, padding=0)
    for row in found:
        families.add_row(row.family, row.gguf, *map(row.cell, columns))
    refused = Table(Column("refused", no_wrap=True), "because", "alone", box=box.SIMPLE_HEAD, caption=ALONE_TITLE, caption_justify="left")
    for architecture, why in REFUSED.items():
        refused.add_row(architecture, why, WORKS if architecture in LANGUAGE_ALONE else "no")
    return Group(families, *reasons(), refused)


def markdown() -> str:
    """The table of docs/families.md, followed by a sentence for each "no"."""
    found = support()
    columns = list(found[0].limits)
    lines = [f"| family | llama.cpp | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    lines += [f"| {row.family} | {row.gguf} | {' | '.join(map(row.cell, columns))} |" for row in found]
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons())]).rstrip()
