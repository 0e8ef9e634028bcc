"""The grid of a quant type that has one."""

from __future__ import annotations

from mbq_gguf.formats.grid import Grid, grid_of
from mbq_gguf.formats.quant_type import QuantType


def grid_for(quant_type: QuantType) -> Grid:
    """The grid of ``quant_type``, whose weights lie on lines."""
    found = grid_of(quant_type)
    assert found is not None
    return found
