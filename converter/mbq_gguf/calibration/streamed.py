"""One sample between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Streamed:
    """One sample on the host between two decoder layers.

    ``hidden`` [1, tokens, width] is the input of the next layer, ``kwargs`` what the model hands to each layer beside it (rotary
    embeddings, mask), ``ids`` [tokens]. Bool [tokens]: ``vision``; ``answer``, the tokens that stand for the answer (Encoded.counted);
    ``labels``, the tokens that the loss is about: answers and their ends. ``salience`` [layers, sites, tokens] is there once the
    sensitivity is measured (see Sensitivity).
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    ids: torch.Tensor
    vision: torch.Tensor
    answer: torch.Tensor
    labels: torch.Tensor
    salience: torch.Tensor | None = None

    @property
    def prompt(self) -> torch.Tensor:
        """Tokens that are neither vision nor answer."""
        return ~(self.vision | self.answer)
