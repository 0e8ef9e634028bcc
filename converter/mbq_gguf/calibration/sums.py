"""Sums of products a^T b over batches, in tiles of rows. Each process sums its own tiles, over all batches in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mbq_gguf import parallel

TILE = 384  # rows per tile
# Minimum for a symmetric sum, where half is left out and a tile has an eighth of the rows: 2048 tokens of 576 columns take a core 4.1 ms
# instead of 5.9 with tiles of 384, and with 1536 columns 32.0 instead of 35.0.
SMALLEST = 96
MIRRORED = 2048  # rows of a symmetric sum whose transpose is copied at a time


@dataclass
class Sum:
    """``total`` [rows, columns] float32 on the device, in tiles of ``tile`` rows. Those of other processes are zero until :meth:`whole`."""

    total: torch.Tensor
    tile: int

    @staticmethod
    def like(a: torch.Tensor, b: torch.Tensor) -> Sum:
        """An empty sum for products of ``a`` [tokens, rows] and ``b`` [tokens, columns]."""
        return Sum(b.new_zeros(a.shape[1], b.shape[1]), TILE)

    @staticmethod
    def square_of(x: torch.Tensor) -> Sum:
        """An empty sum for products of inputs like ``x`` [tokens, columns] with themselves."""
        return Sum(x.new_zeros(x.shape[1], x.shape[1]), min(TILE, max(SMALLEST, x.shape[1] // 8)))

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a^T b for ``a`` [tokens, rows] and ``b`` [tokens, columns]."""
        for add in self.adding(a, b):
            add()

    def add_square(self, x: torch.Tensor) -> None:
        """Add x^T x: the upper triangle, and whatever else is in the same tiles."""
        for add in self.adding_square(x):
            add()

    def adding(self, a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], object]]:
        """The work of :meth:`add` as one task per tile; tasks may run in parallel."""
        return [partial(self.total[tile].addmm_, a[:, tile].t(), b) for tile in self._own()]

    def adding_square(self, x: torch.Tensor) -> list[Callable[[], object]]:
        """The work of :meth:`add_square` as one task per tile."""
        return [partial(self.total[tile, tile.start :].addmm_, x[:, tile].t(), x[:, tile.start :]) for tile in self._own()]

    def whole(self) -> torch.Tensor:
        """The complete sum."""
        parallel.gather_pieces([self.total[tile] for tile in self._tiles()])
        return self.total

    def whole_square(self) -> torch.Tensor:
        """The complete symmetric sum of :meth:`add_square`; its lower triangle is filled in place."""
        parallel.gather_pieces([self.total[tile, tile.start :] for tile in self._tiles()])
        for start in range(0, len(self.total), MIRRORED):
            here, later = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
            square = self.total[here, here]
            square.copy_(square.triu() + square.triu(1).t())
            self.total[later, here] = self.total[here, later].t()
        return self.total

    def _tiles(self) -> list[slice]:
        return [slice(start, start + self.tile) for start in range(0, len(self.total), self.tile)]

    def _own(self) -> list[slice]:
        """This process's tiles: every n-th, since the later ones of a triangle are smaller."""
        tiles = self._tiles()
        return [tiles[number] for number in parallel.own_pieces(len(tiles))]


def root_weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``x`` [tokens, columns] times the square root of each token's weight [tokens]. Both sides of a product then have the same factor, so
    the sum is positive semidefinite whatever the rounding. If all weights are 1, this is ``x`` itself: copies of all inputs take 3 % of the
    moments' time. Weights on a GPU (experts') are not looked at, since the host would wait for them.
    """
    return x if weights.device.type == "cpu" and bool((weights == 1).all()) else x * weights.sqrt().to(x.device)[:, None]
