"""Splits the stacked experts of transformers into linears, so that each expert runs only on its own tokens.

An expert's linears are then readers like any others. :class:`Experts` records which tokens are the rows of each expert's input. If
calibration asks for it, an expert also sees tokens that did not choose it: their outputs are discarded, but they count in the Hessians.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

READERS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """Expert ``number`` of a stack [experts, rows, columns], sharing its memory, or of a ``transposed`` one, [experts, columns, rows]."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, stack: Any, number: int, transposed: bool) -> None:
        super().__init__()
        gate_up, down = (matrix.detach()[number] for matrix in (stack.gate_up_proj, stack.down_proj))
        if transposed:
            gate_up, down = (matrix.transpose(0, 1).contiguous() for matrix in (gate_up, down))
        for name, weight in zip(READERS, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, linear)
        self.act_fn = stack.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [1, tokens, width] for ``x`` of the same shape."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """The experts of one layer, replacing transformers' stack.

    ``shares``: the share of the tokens that did not choose an expert which it sees nevertheless. After a run, ``reached[number]`` tokens
    have chosen expert ``number``, ``rows[number]`` [rows] are the tokens that it received, and ``weights[number]`` [rows] the factors by
    which squared errors there enter the residual stream: the squared router weights, or their mean for tokens that did not choose it.
    ``scales_inputs``: the router weights multiply the experts' inputs instead of their outputs (Llama 4), so that the Hessians already
    contain them. With ``counts_only`` no expert runs, and the output is 0.
    """

    def __init__(self, stack: Any, scales_inputs: bool = False) -> None:
        super().__init__([Expert(stack, number, transposed=scales_inputs) for number in range(len(stack.down_proj))])
        self.scales_inputs = scales_inputs
        self.shares = [0.0] * len(self)
        self.counts_only = False
        self.reached: list[int] = []
        self.rows: dict[int, torch.Tensor] = {}
        self.weights: dict[int, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Output [tokens, width] for ``hidden`` of the same shape; ``chosen`` [tokens, k] are expert indices, ``gains`` router weights."""
        out = torch.zeros_like(hidden)
        self.reached, self.rows, self.weights = [], {}, {}
        typical = gains.detach().square().mean().sqrt()
        for number, route in enumerate(_routes(chosen, self.shares)):
            self.reached.append(route.own)
            if self.counts_only or route.own + route.more == 0:
                continue
            rows = torch.cat([route.tokens, route.others])
            gain = torch.cat([gains[route.tokens, route.places], typical.expand(route.more)])
            inputs = (hidden[rows] * gain[:, None]).to(hidden.dtype) if self.scales_inputs else hidden[rows]
            found = self[number](inputs[None])[0, : route.own]
            out.index_add_(0, route.tokens, (found if self.scales_inputs else found * gain[: route.own, None]).to(out.dtype))
            weights = torch.ones_like(gain) if self.scales_inputs else gain.detach().square()
            self.rows[number], self.weights[number] = rows, weights.float()
        return out


class Route(NamedTuple):
    """The ``own`` tokens that chose an expert, its place among the choices of each, and ``more`` others, which did not choose it."""

    own: int
    more: int
    tokens: torch.Tensor
    places: torch.Tensor
    others: torch.Tensor


def _routes(chosen: torch.Tensor, shares: list[float]) -> list[Route]:
    """The route of each expert; its ``others`` are evenly spaced, as many as its share says. All are found at once, so that a GPU is waited
    for twice, instead of three times for each expert.
    """
    order, width = chosen.flatten().argsort(stable=True), chosen.shape[1]
    chose = torch.zeros(len(shares), len(chosen), dtype=torch.bool, device=chosen.device)
    chose[chosen, torch.arange(len(chosen), device=chosen.device)[:, None]] = True
    share = torch.tensor(shares, dtype=torch.float64).to(chosen.device)[:, None]
    step = ((~chose).cumsum(1) - 1) * share  # of a token that did not choose the expert: how many of those before it are taken
    taken = (step.floor() > (step - share).floor()) & ~chose
    own, more = torch.stack([chose.sum(1), taken.sum(1)]).tolist()
    tokens, places = torch.split(order.div(width, rounding_mode="floor"), own), torch.split(order % width, own)
    return [Route(*each) for each in zip(own, more, tokens, places, torch.split(taken.nonzero()[:, 1], more), strict=True)]


class Llama4Block(nn.Module):
    """Llama 4's experts, router and shared expert. It replaces transformers' ``block``, which runs every expert on every token, multiplied
    by zero if it is not chosen."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, Experts(block.experts, scales_inputs=True)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output like ``hidden`` [..., width], and the router's logits [tokens, experts]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(tokens)  # 0 for experts that are not chosen
        gains, chosen = scores.topk(self.router.top_k, dim=-1)
        return self.shared_expert(hidden) + self.experts(tokens, chosen, gains).view_as(hidden), logits


def open_experts(layer: nn.Module, name: str) -> None:
    """Replace the stack of experts called ``name`` in ``layer``, if there is one, by :class:`Experts`."""
    parent, _, own = name.rpartition(".")
    try:
        holder = layer.get_submodule(parent)
    except AttributeError:
        return
    stack = getattr(holder, own, None)
    matrices = [getattr(stack, matrix, None) for matrix in ("gate_up_proj", "down_proj")]
    if not all(isinstance(matrix, torch.Tensor) and matrix.ndim == 3 for matrix in matrices):
        return
    if type(stack).__name__ == "Llama4TextExperts":
        setattr(layer, parent, Llama4Block(holder))
    else:
        setattr(holder, own, Experts(stack))
