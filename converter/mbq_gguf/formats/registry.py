"""Every quant type by name, and the one that a row size allows."""

from __future__ import annotations

import re
from functools import cache

from mbq_gguf.errors import UsageError
from mbq_gguf.formats import row_scale, stock
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import QuantType


def names() -> list[str]:
    """Every name that :func:`quant_type` takes."""
    return [*OWN, *row_scale.QUANT_TYPES, *stock.NAMES]


@cache
def quant_type(name: str) -> QuantType:
    """The quant type called ``name`` (in any case). Raises UsageError, with the known names, for any other."""
    upper = name.upper()
    if upper in OWN:
        return OWN[upper]
    if upper in row_scale.QUANT_TYPES:
        return row_scale.QUANT_TYPES[upper]
    if upper in stock.NAMES:
        return stock.stock_type(upper)
    raise UsageError(f"there is no type {name}{_mixture(upper)}: choose one of {', '.join(names())}")


def _mixture(name: str) -> str:
    """What is to be said of llama-quantize's Q4_K_M and its like, which are no types; "" of other names."""
    main = re.sub(r"_(S|M|L)$", "", name)
    return f" (llama-quantize mixes types under this name, {main} above all; --target-bpw mixes them here)" if main in stock.NAMES else ""


def quant_type_for(name: str, columns: int) -> QuantType:
    """The quant type called ``name``, or the first of its fallbacks that stores rows of ``columns`` weights.

    One with a scale for the whole row has that row as its block.
    """
    found = quant_type(name)
    while not found.fits(columns):
        found = quant_type(found.fallback or "F16")
    return row_scale.for_rows(found.name, columns) if found.name in row_scale.QUANT_TYPES else found
