"""Which row of a Hugging Face tensor each row of a GGUF tensor comes from, found out by experiment.

llama.cpp permutes, splits and merges rows of some architectures (rotary q and k of Llama, merged qkv, ...). Sending row numbers instead
of weights through the very function that will transform the weights finds the order for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mbq_gguf.errors import UserError

Transform = Callable[[torch.Tensor], Iterable[tuple[str, torch.Tensor]]]


def row_order(transform: Transform, shape: tuple[int, int], name: str) -> dict[str, npt.NDArray[np.int64]]:
    """For each tensor that ``transform`` makes of ``name`` [rows, columns]: the source row of each of its rows.

    Raises UserError where ``transform`` does more than move whole rows: blocks of quantised weights cannot follow that.
    """
    rows, columns = shape
    # float32 holds every integer up to 2^24 exactly, more rows or columns than any layer has. The probes take no memory of their own.
    down = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, columns)
    across = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    orders: dict[str, npt.NDArray[np.int64]] = {}
    for (output, by_row), (_, by_column) in zip(transform(down), transform(across), strict=True):
        if by_row is down:  # the common case: nothing was moved
            orders[output] = np.arange(rows)
            continue
        if not _whole_rows(by_row, by_column, rows, columns):
            raise UserError(
                f"llama.cpp reshapes {name} in a way that quantised blocks cannot follow: this model needs an adapter of its own"
            )
        orders[output] = by_row[:, 0].to(torch.int64).numpy()
    return orders


def _whole_rows(by_row: Any, by_column: Any, rows: int, columns: int) -> bool:
    """Whether each row of the two transformed probes is one row of the originals, whole and in order."""
    if by_row.ndim != 2 or by_row.shape != by_column.shape or by_row.shape[1] != columns:
        return False
    first = by_row[:, :1]
    inside = bool(((first >= 0) & (first < rows) & (first == first.round())).all())
    unmoved = torch.equal(by_column, torch.arange(columns, dtype=torch.float32).expand(by_column.shape[0], columns))
    return inside and bool((by_row == first).all()) and unmoved
