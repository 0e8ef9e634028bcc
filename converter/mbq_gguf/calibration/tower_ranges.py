"""Static ranges of a vision tower's activations, one for each block and site, for all rows of all pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mbq_gguf.calibration.magnitudes import Estimator, Magnitudes
from mbq_gguf.formats.static_ranges import SITES, VERSION, VERSION_KEY, range_key
from mbq_gguf.transforms.activations import SMALLEST_AMAX, int8_tokens

ESTIMATOR: Estimator = "p99.99"
COARSER = 4.0  # a site stays dynamic if steps are this many times those of the rows' own ranges: two of eight bits
MOST = 0.9  # share of a site's rows; the others may be outliers, as class tokens and registers are


@dataclass
class SiteInputs:
    """Statistics of a site's inputs: magnitudes, each row's own range, and the sum of squared errors of int8 with those ranges."""

    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    rows: list[torch.Tensor] = field(default_factory=list)
    dynamic: float = 0.0
    last: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Count every row of ``x`` [..., columns]."""
        x = x.detach().float()
        self.magnitudes.add(x)
        self.rows.append(x.abs().amax(dim=-1).flatten().cpu())
        self.dynamic += float((int8_tokens(x) - x).double().square().sum())

    def hook(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Count the input of a module, once if the previous module had the very same."""
        if args[0] is not self.last:
            self.add(args[0])
        self.last = args[0]

    def range(self, estimator: Estimator) -> float:
        """The range that ``estimator`` chooses, or 0 (dynamic) if outliers ruin it: if most rows lose two bits, or if it costs as much in
        squared errors, as clipping outliers does.
        """
        limit = self.magnitudes.range(estimator)
        return limit if limit >= SMALLEST_AMAX and self.coarser(limit) <= COARSER and self.worse(limit) <= COARSER**2 else 0.0

    def coarser(self, limit: float) -> float:
        """The factor by which ``limit`` makes the steps of :data:`MOST` of the rows coarser than their own range, at least."""
        return limit / max(float(np.quantile(torch.cat(self.rows).numpy(), MOST)), SMALLEST_AMAX)

    def worse(self, limit: float) -> float:
        """The squared error with ``limit`` for all rows, relative to that with each row's own range."""
        return float(self.magnitudes.squared_errors(torch.tensor([limit]))) / max(self.dynamic, 1e-300)


def tower_range_keys(estimator: Estimator, ranges: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The metadata of a vision file for its ``ranges`` [blocks, :data:`SITES`, in a layout's order]."""
    keys: dict[str, Any] = {VERSION_KEY: VERSION, "mbq.act.estimator": estimator}
    return keys | {range_key(site, "vision"): [block[index] for block in ranges] for index, site in enumerate(SITES)}


@contextmanager
def counting(sites: Sequence[Sequence[nn.Module]]) -> Iterator[list[SiteInputs]]:
    """While open, counts the inputs of the readers of each of ``sites``. In Gemma 4 each has an input of its own, clamped to limits of its
    own."""
    found = [SiteInputs() for _ in sites]
    handles = [module.register_forward_pre_hook(site.hook) for readers, site in zip(sites, found, strict=True) for module in readers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
