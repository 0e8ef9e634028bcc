"""What GPTQ's loop over the columns of a group reads and writes: the same for PyTorch's operations, Triton's kernel and compiled C."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Float32 tensors with the rows of a matrix side by side; what is rounded are ``columns`` of them, to codes ``low`` to ``high``."""

    work: torch.Tensor  # [columns, rows], the weights of a block of columns; those that follow the group's are changed
    factor: torch.Tensor  # [columns, columns], the block's part of U
    line: torch.Tensor  # [2, 1, rows], scale and offset of the group
    codes: torch.Tensor  # [columns, rows], filled for the group's columns, as errors are
    errors: torch.Tensor
    columns: range
    low: float
    high: float
