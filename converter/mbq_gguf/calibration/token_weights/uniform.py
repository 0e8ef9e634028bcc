"""All tokens alike."""

from __future__ import annotations

import torch

from mbq_gguf.calibration.stream import Streamed
from mbq_gguf.models.decoder import Group


def uniform(stream: Streamed, group: Group) -> torch.Tensor:
    """1 for every token (AWQ, GPTQ)."""
    return torch.ones(stream.ids.shape)
