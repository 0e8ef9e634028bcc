"""Additional tokens for experts that few tokens reach. With fewer tokens than channels, a Hessian says nothing about most directions.

GPTQ then moves its errors into these directions, and the expert becomes worse for all tokens outside the calibration set. It therefore also
sees tokens of other experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.stream import run_batch
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.parallel import Parts, parallel_map

# Tokens that an expert should see, per channel of its input. In tests/calibration/test_experts.py an expert that 6 tokens reach has a
# relative error of 0.335 on others of its kind by these alone, 0.270 at 1, 0.187 at 4, 0.173 with all; those that many reach 0.194.
TOKENS = 4


@torch.no_grad()
def shares_of(layer: Layer, streams: Sequence[Streamed]) -> list[float]:
    """For each expert of ``layer``, the share of other experts' tokens in ``streams`` that it sees. ``streams`` are not changed."""
    experts = layer.experts
    if experts is None:
        return []
    total, width = sum(stream.hidden.shape[1] for stream in streams), streams[0].hidden.shape[2]

    def reached_by(batch: list[Streamed]) -> Parts:
        run_batch(layer, batch)
        return {"reached": torch.tensor(experts.reached)}

    experts.counts_only = True
    try:
        reached = sum(parts["reached"] for _, parts in parallel_map(list(batches(streams, layer)), reached_by))
    finally:
        experts.counts_only = False
    assert isinstance(reached, torch.Tensor)
    wanted = min(TOKENS * width, total)
    return [(wanted - own) / (total - own) if own < wanted else 0.0 for own in reached.tolist()]


@contextmanager
def seeing_others(layer: Layer, shares: list[float]) -> Iterator[None]:
    """While open, experts of ``layer`` see ``shares`` of other experts' tokens. Does nothing for a layer without experts."""
    experts = layer.experts
    if experts is None:
        yield
        return
    kept, experts.shares = experts.shares, shares or [0.0] * len(experts)
    try:
        yield
    finally:
        experts.shares = kept
