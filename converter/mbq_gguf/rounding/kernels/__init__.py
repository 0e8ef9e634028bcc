"""Fused kernels for rounding's loops of small operations: Triton for GPUs, with one launch instead of hundreds, and C for CPUs, with one
pass over cached data instead of hundreds.

Each kernel processes some rows, which are independent of each other, and goes through the columns in the same order and with the same
rounding as PyTorch's operations (products and sums are not contracted, except where `addr_` does). Triton comes with PyTorch's CUDA builds;
both need a C compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from subprocess import CalledProcessError

import torch

from mbq_gguf.formats.grid import Pair
from mbq_gguf.rounding.kernels import compiled
from mbq_gguf.rounding.kernels.group import Group


@dataclass(frozen=True)
class Kernels:
    """The functions of one implementation, documented in compiled.py; ``carry`` and ``factor`` are None if a library is used."""

    search: Callable[..., Pair]
    round_group: Callable[[Group], None]
    descend_columns: Callable[..., torch.Tensor]
    carry: Callable[..., None] | None
    fill: Callable[..., None]
    take_steps: Callable[..., Pair]
    factor: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] | None = None


def kernels_for(like: torch.Tensor) -> Kernels | None:
    """The kernels for the device of ``like``; None if a C compiler or Triton is missing, or for an old GPU."""
    kind = like.device.type
    return _of_cards() if kind == "cuda" else _of_cpus() if kind == "cpu" else None


@cache
def _of_cards() -> Kernels | None:
    if torch.cuda.get_device_capability() < (8, 0):  # older GPUs lack TF32 and shared memory
        return None
    try:
        found = of_triton()
        one = torch.ones(1, 1, device="cuda")
        found.descend_columns(one, one, one, one.clone(), 0, 1)  # Triton needs a compiler at the first launch
    except (ImportError, OSError, RuntimeError, CalledProcessError):
        return None
    return found


@cache
def _of_cpus() -> Kernels | None:
    if compiled.library() is None:
        return None
    return Kernels(
        compiled.search, compiled.round_group, compiled.descend_columns, None, compiled.fill, compiled.take_steps, compiled.factor
    )


def of_triton() -> Kernels:
    """The Triton kernels; raises ImportError without Triton."""
    columns, search, systems = (importlib.import_module(f"{__name__}.{name}") for name in ("columns", "search", "systems"))
    return Kernels(search.search, columns.round_group, columns.descend_columns, columns.carry, systems.fill, systems.take_steps)
