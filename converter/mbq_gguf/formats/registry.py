"""Looks up quant types by name, and the fallback type that fits a row length."""

from __future__ import annotations

import re
from functools import cache

from mbq_gguf.errors import UsageError
from mbq_gguf.formats import row_scale, stock
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import QuantType


def names() -> list[str]:
    """All names that :func:`quant_type` accepts."""
    return [*OWN, *row_scale.QUANT_TYPES, *stock.NAMES]


@cache
def quant_type(name: str) -> QuantType:
    """The quant type called ``name``, case-insensitive. Raises UsageError, which lists the known names, for any other."""
    upper = name.upper()
    if upper in OWN:
        return OWN[upper]
    if upper in row_scale.QUANT_TYPES:
        return row_scale.QUANT_TYPES[upper]
    if upper in stock.NAMES:
        return stock.stock_type(upper)
    raise UsageError(f"there is no type {name}{_mixture(upper)}: choose one of {', '.join(names())}")


def _mixture(name: str) -> str:
    """A hint for llama-quantize's mixtures such as Q4_K_M, which are not types; "" for other names."""
    main = re.sub(r"_(S|M|L)$", "", name)
    return (
        f" (in llama-quantize this name is a mixture of types, mainly {main}; here --target-bpw makes mixtures)"
        if main in stock.NAMES
        else ""
    )


def quant_type_for(name: str, columns: int) -> QuantType:
    """The quant type called ``name``, or the first of its fallbacks that can store rows of ``columns`` weights.

    For a type with one scale per row, the block is the row.
    """
    found = quant_type(name)
    while not found.fits(columns):
        found = quant_type(found.fallback or "F16")
    return row_scale.for_rows(found.name, columns) if found.name in row_scale.QUANT_TYPES else found
