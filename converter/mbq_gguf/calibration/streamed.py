"""The state of one sample between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass
class Streamed:
    """The state of one sample between two decoder layers. Its activations are on the GPU, the host or the disk (spill.py), the rest on the
    host.

    ``hidden`` [1, tokens, width] is the output of the previous layer; ``added`` is what the model adds to it before a layer, by the layer's
    number (DeepStack: picture features from earlier in the vision tower); ``kwargs`` are the other arguments of each layer (rotary
    embeddings, mask); ``ids`` is [tokens]. Bool [tokens] are ``vision``; ``answer``, the tokens that count as the answer (Encoded.counted);
    ``labels``, the tokens of the loss: answers and their ends. ``salience`` [layers, sites, tokens] is set once the sensitivity is measured
    (see Sensitivity). In layers ``alone`` the sample cannot share a batch. ``handed`` are the keys and values that layers pass to later
    ones, by the layers' kind [2, 1, heads, tokens, channels]; None if no layer uses those of another.
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    ids: torch.Tensor
    vision: torch.Tensor
    answer: torch.Tensor
    labels: torch.Tensor
    salience: torch.Tensor | None = None
    added: dict[int, torch.Tensor] = field(default_factory=dict)
    alone: frozenset[int] = frozenset()
    handed: dict[str, torch.Tensor] | None = None

    def entering(self, index: int) -> torch.Tensor:
        """The input of layer ``index`` [1, tokens, width], if ``hidden`` is the output of the layer before."""
        return self.hidden + self.added[index].to(self.hidden.device) if index in self.added else self.hidden

    def turned(self, basis: torch.Tensor) -> Streamed:
        """The same with the residual stream in another ``basis`` [width, width], float64, computed on its device."""
        hidden, *added = ((x.to(basis.device).double() @ basis).to(x) for x in (self.hidden, *self.added.values()))
        return replace(self, hidden=hidden, added=dict(zip(self.added, added, strict=True)))

    @property
    def prompt(self) -> torch.Tensor:
        """Tokens that are neither vision nor answer."""
        return ~(self.vision | self.answer)
