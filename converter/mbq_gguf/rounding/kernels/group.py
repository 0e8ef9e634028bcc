"""The arguments of GPTQ's loop over the columns of a group, the same for PyTorch, Triton and C."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Float32 tensors, with the rows of a matrix contiguous; ``columns`` are rounded, to codes from ``low`` to ``high``."""

    work: torch.Tensor  # [columns, rows], the weights of a block of columns; those that follow the group's are changed
    factor: torch.Tensor  # [columns, columns], the block's part of U
    line: torch.Tensor  # [2, 1, rows], scale and offset of the group
    codes: torch.Tensor  # [columns, rows], filled for the group's columns, as errors are
    errors: torch.Tensor
    columns: range
    low: float
    high: float
