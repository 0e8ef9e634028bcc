"""Determines, by experiment, which row of a Hugging Face tensor each row of a GGUF tensor comes from.

For some architectures llama.cpp permutes, splits and merges rows (rotary q and k of Llama, merged qkv, ...), and for a few also columns, by
heads (Qwen3.5's delta nets). Passing row indices instead of weights through the same function reveals the order for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mbq_gguf.errors import UserError
from mbq_gguf.formats.quant_type import Bytes

Transform = Callable[[torch.Tensor], Iterable[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class Order:
    """For each row of a tensor, its source row, and for each block of columns its source block; None if columns are where they were."""

    rows: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64] | None = None

    def of(self, data: Bytes) -> Bytes:
        """Packed rows [rows, bytes] in this order."""
        moved = data[self.rows]
        return moved if self.blocks is None else moved.reshape(len(moved), len(self.blocks), -1)[:, self.blocks].reshape(len(moved), -1)


def row_order(transform: Transform, shape: tuple[int, int], name: str, block: int) -> dict[str, Order]:
    """For each tensor that ``transform`` makes from ``name`` [rows, columns]: the source of its rows and of its blocks of ``block``
    columns.

    Raises UserError if ``transform`` does more than move whole rows and whole blocks, which is impossible for quantised weights.
    """
    rows, columns = shape
    # float32 represents integers up to 2^24 exactly, more than any layer has rows or columns. The probes are views and take no memory.
    down = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, columns)
    across = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    orders: dict[str, Order] = {}
    for (output, by_row), (_, by_column) in zip(transform(down), transform(across), strict=True):
        if by_row is down:  # the common case: nothing was moved
            orders[output] = Order(np.arange(rows))
            continue
        if not (_whole_rows(by_row, rows, columns) and _whole_blocks(by_row, by_column, columns, block)):
            raise UserError(
                f"llama.cpp reshapes {name} in a way that is impossible for quantised blocks of {block}: "
                "choose a type with smaller blocks, or this model needs an adapter of its own"
            )
        starts = by_column[0, ::block].to(torch.int64).numpy() // block
        orders[output] = Order(by_row[:, 0].to(torch.int64).numpy(), None if (starts == np.arange(len(starts))).all() else starts)
    return orders


def _whole_rows(by_row: Any, rows: int, columns: int) -> bool:
    """Whether each row of the transformed probe is one row of the original."""
    if by_row.ndim != 2 or by_row.shape[1] != columns:
        return False
    first = by_row[:, :1]
    inside = bool(((first >= 0) & (first < rows) & (first == first.round())).all())
    return inside and bool((by_row == first).all())


def _whole_blocks(by_row: Any, by_column: Any, columns: int, block: int) -> bool:
    """Whether all rows have the same order of columns, which moves only whole blocks of ``block`` columns."""
    if by_row.shape != by_column.shape or columns % block:
        return False
    order = by_column[0]
    starts = order[::block]
    moved = (starts[:, None] + torch.arange(block)).reshape(-1)
    aligned = bool((starts % block == 0).all()) and torch.equal(starts.sort().values, torch.arange(0, columns, block, dtype=order.dtype))
    return aligned and torch.equal(order, moved) and bool((by_column == order).all())
