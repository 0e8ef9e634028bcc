"""Looks into a checkpoint's safetensors files without building the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from mbq_gguf.errors import UserError


def shapes(files: Sequence[Path]) -> Iterator[list[int]]:
    """The shape of every tensor in ``files``, from their headers alone."""
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield list(opened.get_slice(name).get_shape())


def names_of(files: Sequence[Path]) -> list[str]:
    """The names of all tensors in ``files``, from their headers alone."""
    names: list[str] = []
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names += opened.keys()
    return names


def check_finite_files(files: Sequence[Path]) -> None:
    """Raise UserError that names the first tensor with a NaN or an infinity. Reads everything once, one tensor at a time."""
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(f"the weight {name} in {file} holds NaN or infinite values: fetch the model again, or mend it")
