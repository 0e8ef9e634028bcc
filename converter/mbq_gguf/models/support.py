"""What works with which family, told from the tables of families and layouts: for a terminal, as JSON, and for docs/families.md."""

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
    """A family, and for each thing that can be done with it why it cannot be, or None."""

    family: str
    architectures: tuple[str, ...]
    gguf: str
    limits: dict[str, str | None]

    def cell(self, column: str) -> str:
        """A word for a table."""
        return "no" if self.limits[column] else WORKS


def support() -> list[Support]:
    """Every family that works, in the order of the table."""
    return [Support(family.name, family.architectures, family.gguf, limits(family)) for family in FAMILIES]


def limits(family: Family) -> dict[str, str | None]:
    """What can be done with ``family``: GPTQ needs no more than its sites, other methods ask the layout, one pass the runtime."""
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
    """The same for programs; what is refused is under "refused", with its reasons, and what converts without its tower
    under "language_alone"."""
    return {"families": [asdict(found) for found in support()], "refused": REFUSED, "language_alone": LANGUAGE_ALONE}


def reasons() -> list[str]:
    """One sentence for each "no"."""
    return [f"{found.family}, {name}: {why}." for found in support() for name, why in found.limits.items() if why]


def table() -> RenderableType:
    """Families and refusals for a terminal, of 80 columns as well."""
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
    """The table of docs/families.md, with a sentence for each "no" below it."""
    found = support()
    columns = list(found[0].limits)
    lines = [f"| family | llama.cpp | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    lines += [f"| {row.family} | {row.gguf} | {' | '.join(map(row.cell, columns))} |" for row in found]
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons())]).rstrip()
