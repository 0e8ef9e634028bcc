"""Experts that transformers keeps as stacks, opened: three linears each, which run on their own tokens alone.

An expert's linears are then readers like any others. Which tokens the rows of its input are it says itself; where calibration asks for it,
an expert also sees tokens of others: their outputs go nowhere, but the inputs of its linears count in Hessians.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

READERS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """Number ``number`` of a stack [experts, rows, columns], over the same memory, or of one ``turned``, [experts, columns, rows]."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, stack: Any, number: int, turned: bool) -> None:
        super().__init__()
        gate_up, down = (matrix.detach()[number] for matrix in (stack.gate_up_proj, stack.down_proj))
        if turned:
            gate_up, down = (matrix.transpose(0, 1).contiguous() for matrix in (gate_up, down))
        for name, weight in zip(READERS, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, linear)
        self.act_fn = stack.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, tokens, width] to the same."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """The experts of one layer, in the place of transformers' stack.

    ``shares``: of the tokens that do not choose an expert, the share that it sees all the same. After a run ``rows[number]`` are the tokens
    [rows] that expert ``number`` was given, and ``weights[number]`` [rows] what the square of an error there is multiplied by on its way
    into the residual stream: the square of the router's weight, its mean for a token that did not choose the expert. ``weighed``: that
    weight multiplies what an expert is given instead (Llama 4's), so that it is in every Hessian already.
    """

    def __init__(self, stack: Any, weighed: bool = False) -> None:
        super().__init__([Expert(stack, number, turned=weighed) for number in range(len(stack.down_proj))])
        self.weighed = weighed
        self.shares = [0.0] * len(self)
        self.rows: dict[int, torch.Tensor] = {}
        self.weights: dict[int, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Output [tokens, width] for ``hidden`` of the same shape; ``chosen`` [tokens, few] are experts, ``gains`` the router's weights."""
        out = torch.zeros_like(hidden)
        self.rows, self.weights = {}, {}
        typical = gains.detach().square().mean().sqrt()
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            others = self._others(number, tokens, len(hidden))
            rows = torch.cat([tokens, others])
            if not len(rows):
                continue
            gain = torch.cat([gains[tokens, place], typical.expand(len(others))])
            before, behind = (gain, torch.ones_like(gain)) if self.weighed else (torch.ones_like(gain), gain)
            own = expert((hidden[rows] * before[:, None]).to(hidden.dtype)[None])[0, : len(tokens)]
            out = out.index_add(0, tokens, (own * behind[: len(tokens), None]).to(out.dtype))
            self.rows[number], self.weights[number] = rows, behind.detach().square().float()
        return out

    def _others(self, number: int, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """Tokens that did not choose expert ``number``, evenly spread, as many as its share says."""
        share = self.shares[number]
        rest = torch.ones(count if share else 0, dtype=torch.bool, device=tokens.device)
        if not share:
            return rest.nonzero()[:, 0]
        rest[tokens] = False
        places = rest.nonzero()[:, 0]
        step = torch.arange(len(places), dtype=torch.float64) * share
        return places[(step.floor() > (step - share).floor()).to(places.device)]


class WeighedBlock(nn.Module):
    """Llama 4's experts, router and shared expert, in the place of transformers' ``block``, which gives every expert every token, times
    zero where it is not chosen."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, Experts(block.experts, weighed=True)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output like ``hidden`` [..., width], and the router's logits [tokens, experts]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(tokens)  # 0 where an expert is not chosen
        gains, chosen = scores.topk(self.router.top_k, dim=-1)
        return self.shared_expert(hidden) + self.experts(tokens, chosen, gains).view_as(hidden), logits


def open_experts(layer: nn.Module, name: str) -> None:
    """Put :class:`Experts` in the place of the stack called ``name`` in ``layer``, where there is one."""
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
        setattr(layer, parent, WeighedBlock(holder))
    else:
        setattr(holder, own, Experts(stack))
