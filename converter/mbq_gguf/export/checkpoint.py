"""Reads the headers of a checkpoint's safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open


def shapes(files: Sequence[Path]) -> Iterator[list[int]]:
    """The shape of every tensor in ``files``, from their headers alone."""
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield list(opened.get_slice(name).get_shape())


def names_of(files: Sequence[Path]) -> list[str]:
    """The names of all tensors in ``files``, from their headers alone."""
    names: list[str] = []
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names += opened.keys()
    return names
