"""Every container by name, and the one that a row size allows."""

from __future__ import annotations

from functools import cache

from mbq_gguf.errors import UsageError
from mbq_gguf.formats import row_scale, stock
from mbq_gguf.formats.container import Container
from mbq_gguf.formats.own import OWN


def names() -> list[str]:
    """Every name that :func:`container` takes."""
    return [*OWN, *row_scale.CONTAINERS, *stock.NAMES]


@cache
def container(name: str) -> Container:
    """The container called ``name`` (in any case). Raises UsageError, with the known names, for any other."""
    upper = name.upper()
    if upper in OWN:
        return OWN[upper]
    if upper in row_scale.CONTAINERS:
        return row_scale.CONTAINERS[upper]
    if upper in stock.NAMES:
        return stock.stock_container(upper)
    raise UsageError(f"there is no type {name}: choose one of {', '.join(names())}")


def container_for(name: str, columns: int) -> Container:
    """The container called ``name``, or the first of its fallbacks that stores rows of ``columns`` weights.

    One with a scale for the whole row has that row as its block.
    """
    found = container(name)
    while not found.fits(columns):
        found = container(found.fallback or "F16")
    return row_scale.for_rows(found.name, columns) if found.name in row_scale.CONTAINERS else found
