"""Histograms of activation magnitudes, which batches add to, and the range for int8 codes that suits them.

A *range* is the largest |x| that int8 can represent: a static scale is range / 127. The dynamic range of a row is its own largest |x|.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Estimator = Literal["minmax", "p99.9", "p99.99", "least-squares"]

SHIFT = 18  # drops the low bits of a float: 8 exponent and 5 fraction bits remain, 32 bins per octave, each 2 to 3 % wide
BINS = 1 << (31 - SHIFT)
CODES = 127


def _edges() -> torch.Tensor:
    """The lower edge of each bin, float64 [BINS]; the bins from infinity on are included."""
    return (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32).double()


@dataclass
class Magnitudes:
    """``counts`` int64 [BINS] of |x| by the leading bits of its float, on the host, and the ``largest`` value."""

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    largest: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count every value of ``x`` (finite)."""
        if x.numel():
            size = x.float().abs().contiguous()
            self.counts += torch.bincount(size.flatten().view(torch.int32) >> SHIFT, minlength=BINS).cpu()
            self.largest = max(self.largest, float(size.max()))

    def quantile(self, share: float) -> float:
        """The upper edge of the bin below which at least ``share`` of the values are; 0 if there are none."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        place = int(torch.searchsorted(self.counts.cumsum(0).double(), share * total))
        return min(self.largest, float(_edges()[min(place + 1, BINS - 1)]))

    def beyond(self, limit: float) -> float:
        """The share of values above ``limit``, up to a bin's width."""
        return float(self.counts[_edges() >= limit].sum()) / max(1, int(self.counts.sum()))

    def range(self, estimator: Estimator) -> float:
        """The range that ``estimator`` chooses; 0 if nothing was counted."""
        if estimator == "minmax":
            return self.largest
        return self._least_squares() if estimator == "least-squares" else self.quantile(float(estimator.removeprefix("p")) / 100)

    def _least_squares(self) -> float:
        """The bin edge with the least :meth:`squared_errors`."""
        used = self.counts.nonzero()[:, 0]
        if not len(used):
            return 0.0
        candidates = _edges()[int(used[-1]) + 1 - torch.arange(min(int(used[-1]) + 1, 6 * 32))].clamp(max=self.largest)
        return float(candidates[self.squared_errors(candidates).argmin()])

    def squared_errors(self, limits: torch.Tensor) -> torch.Tensor:
        """The sum of squared errors of all values for each of ``limits`` [n] as range: rounding within it, clipping above it."""
        used, edges = self.counts.nonzero()[:, 0], _edges()
        value, count = (edges[used] + edges[(used + 1).clamp(max=BINS - 1)]) / 2, self.counts[used].double()
        limit = limits.double()[:, None]
        rounded = torch.minimum(value**2, (limit / CODES) ** 2 / 12)
        return (torch.where(value <= limit, rounded, (value - limit) ** 2) * count).sum(1)
