"""One sample between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass
class Streamed:
    """One sample between two decoder layers; its activations wait on the card, the host or the disk (spill.py), the rest on the host.

    ``hidden`` [1, tokens, width] is the output of the layer before, ``added`` what the model adds to it before a layer, by the layer's
    number (DeepStack: features of a picture from further down in the vision tower), ``kwargs`` what the model hands to each layer
    beside it (rotary embeddings, mask), ``ids`` [tokens]. Bool [tokens]: ``vision``; ``answer``, the tokens that stand for the answer
    (Encoded.counted); ``labels``, the tokens that the loss is about: answers and their ends. ``salience`` [layers, sites, tokens] is there
    once the sensitivity is measured (see Sensitivity). In layers ``alone`` no other sample may stand beside it. ``handed`` are the keys and
    values that layers have handed on, by the layers' kind [2, 1, heads, tokens, channels]; None where none takes those of others.
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
        """The input of layer ``index`` [1, tokens, width], where ``hidden`` is the output of the one before it."""
        return self.hidden + self.added[index].to(self.hidden.device) if index in self.added else self.hidden

    def turned(self, basis: torch.Tensor) -> Streamed:
        """The same with the residual stream in another ``basis`` [width, width], float64, on whose device this is computed."""
        hidden, *added = ((x.to(basis.device).double() @ basis).to(x) for x in (self.hidden, *self.added.values()))
        return replace(self, hidden=hidden, added=dict(zip(self.added, added, strict=True)))

    @property
    def prompt(self) -> torch.Tensor:
        """Tokens that are neither vision nor answer."""
        return ~(self.vision | self.answer)
