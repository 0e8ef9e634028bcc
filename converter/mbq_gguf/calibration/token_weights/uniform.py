"""Weighs all tokens equally."""

from __future__ import annotations

import torch

from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layout import Site


def uniform(stream: Streamed, site: Site) -> torch.Tensor:
    """1 for every token (AWQ, GPTQ)."""
    return torch.ones(stream.ids.shape)
