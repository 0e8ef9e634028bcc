"""The chains of small operations of rounding as Triton kernels, for cards: one launch where a recorded loop has hundreds.

A program holds some rows, which are independent of one another, and goes through the columns in the same order and with the same
roundings as PyTorch's operations (products and sums are not contracted, but where `addr_` does it). PyTorch's CUDA builds bring Triton,
which wants a C compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from subprocess import CalledProcessError

import torch

from mbq_gguf.formats.grid import Pair


@dataclass(frozen=True)
class Kernels:
    """Functions of the modules of this package."""

    search: Callable[..., Pair]
    round_group: Callable[..., None]
    descend_columns: Callable[..., torch.Tensor]
    carry: Callable[..., None]
    fill: Callable[..., None]
    take_steps: Callable[..., Pair]


def kernels_for(like: torch.Tensor) -> Kernels | None:
    """The kernels for tensors where ``like`` is; None where that is no card, or an old one, or Triton or its C compiler is
    missing."""
    return _kernels() if like.device.type == "cuda" else None


@cache
def _kernels() -> Kernels | None:
    if torch.cuda.get_device_capability() < (8, 0):  # older ones have neither TF32 nor the shared memory
        return None
    try:
        found = all_kernels()
        one = torch.ones(1, 1, device="cuda")
        found.descend_columns(one, one, one, one.clone(), 0, 1)  # a compiler is looked for at the first launch
    except (ImportError, OSError, RuntimeError, CalledProcessError):
        return None
    return found


def all_kernels() -> Kernels:
    """The kernels; ImportError without Triton."""
    columns, search, systems = (importlib.import_module(f"{__name__}.{name}") for name in ("columns", "search", "systems"))
    return Kernels(search.search, columns.round_group, columns.descend_columns, columns.carry, systems.fill, systems.take_steps)
