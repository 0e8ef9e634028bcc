"""An embedding whose table stays in the checkpoint's file, because it is larger than the rest of the model and few rows are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mbq_gguf.models.lazy import LazyTensor

TABLE = "embed_tokens_per_layer"  # per-layer inputs of each token (Gemma 4's small models; 4.7 GB of E2B's 10)


class FileRows(nn.Module):
    """Replaces the embedding ``of``: reads rows from the mapped file and returns them on ``device`` in ``dtype``."""

    def __init__(self, of: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = of.weight.read() if isinstance(of.weight, LazyTensor) else of.weight.detach()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale, self.device, self.dtype = float(of.scalar_embed_scale), device, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., width] of ``ids`` [...]."""
        rows = nn.functional.embedding(ids.to(self.weight.device), self.weight)
        return rows.to(self.device, self.dtype) * self.scale


def leave_in_file(decoder: nn.Module, device: torch.device, dtype: torch.dtype) -> list[nn.Module]:
    """Replace such an embedding of ``decoder``, if there is one, by :class:`FileRows`; returns the new modules."""
    found = getattr(decoder, TABLE, None)
    if found is None:
        return []
    rows = FileRows(found, device, dtype)
    setattr(decoder, TABLE, rows)
    return [rows]
