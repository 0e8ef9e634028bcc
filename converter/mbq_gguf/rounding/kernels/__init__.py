"""The chains of small operations of rounding as kernels: Triton's for cards, one launch where a recorded loop has hundreds, and compiled C
for CPUs, one pass over what a core's cache holds where PyTorch has hundreds.

Each holds some rows, which are independent of one another, and goes through the columns in the same order and with the same
roundings as PyTorch's operations (products and sums are not contracted, but where `addr_` does it). PyTorch's CUDA builds bring Triton;
both want a C compiler.
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
    """Functions of the modules of this package, with compiled.py's words; ``carry`` and ``factor`` None where a library does it."""

    search: Callable[..., Pair]
    round_group: Callable[[Group], None]
    descend_columns: Callable[..., torch.Tensor]
    carry: Callable[..., None] | None
    fill: Callable[..., None]
    take_steps: Callable[..., Pair]
    factor: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] | None = None


def kernels_for(like: torch.Tensor) -> Kernels | None:
    """The kernels for tensors where ``like`` is; None where a C compiler or Triton is missing, or the card is an old one."""
    kind = like.device.type
    return _of_cards() if kind == "cuda" else _of_cpus() if kind == "cpu" else None


@cache
def _of_cards() -> Kernels | None:
    if torch.cuda.get_device_capability() < (8, 0):  # older ones have neither TF32 nor the shared memory
        return None
    try:
        found = of_triton()
        one = torch.ones(1, 1, device="cuda")
        found.descend_columns(one, one, one, one.clone(), 0, 1)  # a compiler is looked for at the first launch
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
    """Triton's kernels; ImportError without it."""
    columns, search, systems = (importlib.import_module(f"{__name__}.{name}") for name in ("columns", "search", "systems"))
    return Kernels(search.search, columns.round_group, columns.descend_columns, columns.carry, systems.fill, systems.take_steps)
