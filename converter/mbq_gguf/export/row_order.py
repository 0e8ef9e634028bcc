"""Which row of a Hugging Face tensor each row of a GGUF tensor comes from, found out by experiment.

llama.cpp permutes, splits and merges rows of some architectures (rotary q and k of Llama, merged qkv, ...), and columns of a few, by heads
(Qwen3.5's delta nets). Sending row numbers instead
of weights through the very function that will transform the weights finds the order for all of them.
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
    """For each row of a tensor its source row, and for each block of columns its source block; None where columns are where they were."""

    rows: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64] | None = None

    def of(self, data: Bytes) -> Bytes:
        """Packed rows [rows, bytes] in this order."""
        moved = data[self.rows]
        return moved if self.blocks is None else moved.reshape(len(moved), len(self.blocks), -1)[:, self.blocks].reshape(len(moved), -1)


def row_order(transform: Transform, shape: tuple[int, int], name: str, block: int) -> dict[str, Order]:
    """For each tensor that ``transform`` makes of ``name`` [rows, columns]: where its rows, and its blocks of ``block`` columns, come from.

    Raises UserError where ``transform`` does more than move whole rows and whole blocks: quantised weights cannot follow that.
    """
    rows, columns = shape
    # float32 holds every integer up to 2^24 exactly, more rows or columns than any layer has. The probes take no memory of their own.
    down = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, columns)
    across = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    orders: dict[str, Order] = {}
    for (output, by_row), (_, by_column) in zip(transform(down), transform(across), strict=True):
        if by_row is down:  # the common case: nothing was moved
            orders[output] = Order(np.arange(rows))
            continue
        if not (_whole_rows(by_row, rows, columns) and _whole_blocks(by_row, by_column, columns, block)):
            raise UserError(
                f"llama.cpp reshapes {name} in a way that quantised blocks of {block} cannot follow: "
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
    """Whether all rows have their columns in one order, which moves blocks of ``block`` columns and nothing smaller."""
    if by_row.shape != by_column.shape or columns % block:
        return False
    order = by_column[0]
    starts = order[::block]
    moved = (starts[:, None] + torch.arange(block)).reshape(-1)
    aligned = bool((starts % block == 0).all()) and torch.equal(starts.sort().values, torch.arange(0, columns, block, dtype=order.dtype))
    return aligned and torch.equal(order, moved) and bool((by_column == order).all())
