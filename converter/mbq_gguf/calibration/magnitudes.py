"""How large activations are, as a histogram that any number of batches adds to, and the range of int8 codes that suits them.

A *range* is the largest |x| that int8 holds: a static scale is range / 127, as a row's own |x| is the range of a dynamic one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Estimator = Literal["minmax", "p99.9", "p99.99", "least-squares"]

SHIFT = 18  # of a float's 31 bits without its sign: 8 of exponent and 5 of fraction are left, 32 bins an octave, each 2 to 3 % wide
BINS = 1 << (31 - SHIFT)
CODES = 127


def _edges() -> torch.Tensor:
    """Where each bin begins, float64 [BINS]; the bins of infinity and beyond begin there too."""
    return (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32).double()


@dataclass
class Magnitudes:
    """``counts`` int64 [BINS] of |x| by the leading bits of its float, on the host, and the ``largest`` of all."""

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    largest: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count every value of ``x`` (finite)."""
        if x.numel():
            size = x.float().abs().contiguous()
            self.counts += torch.bincount(size.flatten().view(torch.int32) >> SHIFT, minlength=BINS).cpu()
            self.largest = max(self.largest, float(size.max()))

    def quantile(self, share: float) -> float:
        """The end of the bin below which at least ``share`` of the values lie; 0 where there are none."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        place = int(torch.searchsorted(self.counts.cumsum(0).double(), share * total))
        return min(self.largest, float(_edges()[min(place + 1, BINS - 1)]))

    def beyond(self, limit: float) -> float:
        """The share of values beyond ``limit``, up to a bin's width."""
        return float(self.counts[_edges() >= limit].sum()) / max(1, int(self.counts.sum()))

    def range(self, estimator: Estimator) -> float:
        """The range that ``estimator`` chooses; 0 where nothing was counted."""
        if estimator == "minmax":
            return self.largest
        return self._least_squares() if estimator == "least-squares" else self.quantile(float(estimator.removeprefix("p")) / 100)

    def _least_squares(self) -> float:
        """The end of a bin with the least :meth:`squared_errors`."""
        used = self.counts.nonzero()[:, 0]
        if not len(used):
            return 0.0
        candidates = _edges()[int(used[-1]) + 1 - torch.arange(min(int(used[-1]) + 1, 6 * 32))].clamp(max=self.largest)
        return float(candidates[self.squared_errors(candidates).argmin()])

    def squared_errors(self, limits: torch.Tensor) -> torch.Tensor:
        """The sum of squared errors of all values by each of ``limits`` [n] as range: rounding within it, cutting beyond it."""
        used, edges = self.counts.nonzero()[:, 0], _edges()
        value, count = (edges[used] + edges[(used + 1).clamp(max=BINS - 1)]) / 2, self.counts[used].double()
        limit = limits.double()[:, None]
        rounded = torch.minimum(value**2, (limit / CODES) ** 2 / 12)
        return (torch.where(value <= limit, rounded, (value - limit) ** 2) * count).sum(1)
