"""Second moments of a group's inputs where the model before it is rounded already, with the original model's inputs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.packs import packs
from mbq_gguf.calibration.stream import Streamed, run_pack, unpack
from mbq_gguf.models.decoder import Group, linear

TILE = 384  # columns of a symmetric sum computed at a time: 11 instead of 16 us a token for 1536 columns


@dataclass
class Moments:
    """With x the input in the rounded model and y the original one: ``hessian`` = sum w x^T x, ``cross`` = sum w (y - x)^T x (None where
    nobody asks for it), both [columns, columns] float32 on the device."""

    hessian: torch.Tensor
    cross: torch.Tensor | None = None


def _add_square(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to ``total`` [columns, columns]: all of its upper triangle, and what else lies in the same tiles."""
    for start in range(0, len(total), TILE):
        end = start + TILE
        total[start:end, start:].addmm_(x[:, start:end].t(), x[:, start:])


class _ReachedError(Exception):
    """Ends a layer's run at the input that was wanted; the rest would be thrown away."""


# The branches of a standard layer (attention, feed-forward) by the linear that each ends in.
BRANCHES = {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"}


class Passage:
    """Streams on their way through one layer while it is rounded.

    Groups are asked for in the layer's order, each when all before it are rounded. A run ends at the group's first linear. What a branch
    gave its last linear does not change any more: it is kept on the host, and later runs begin that branch there. So attention and the
    wide linears run once a sample, not four times.
    """

    def __init__(self, layer: nn.Module, index: int, streams: Sequence[Streamed]) -> None:
        self.layer, self.index, self.streams = layer, index, streams
        self.packs = list(packs(streams, index))
        self.device = next(layer.parameters()).device
        self.kept: dict[str, list[torch.Tensor]] = {}  # by the last linear's name, one [1, tokens, columns] a pack

    @torch.no_grad()
    def moments(self, group: Group, weights: TokenWeights, originals: Sequence[torch.Tensor] | None = None) -> Moments:
        """Moments of ``group``'s input.

        ``originals`` are the same inputs in the original model, one [tokens, columns] a stream; without them there are no cross moments.
        """
        found: Moments | None = None
        rest = iter(originals or ())
        for pack, x in zip(self.packs, self._inputs(group), strict=True):
            root = torch.cat([weights(stream, group) for stream in pack]).to(x.device).sqrt()[:, None]
            rooted = x * root  # both sides of the product alike, so that the sum is positive however it is rounded
            if found is None:
                square = x.new_zeros(x.shape[1], x.shape[1])
                found = Moments(square, None if originals is None else square.clone())
            _add_square(found.hessian, rooted)
            if found.cross is not None:
                difference = torch.cat(list(islice(rest, len(pack)))).to(x).sub_(x).mul_(root)
                found.cross.addmm_(difference.t(), rooted)
        assert found is not None
        found.hessian = found.hessian.triu() + found.hessian.triu(1).t()
        return found

    @torch.no_grad()
    def advance(self) -> None:
        """Send the streams on to the next layer, in place, when the whole layer is rounded."""
        for number, pack in enumerate(self.packs):
            with self._resumed(number):
                unpack(pack, run_pack(self.layer, self.index, pack))
        self.restart()

    def restart(self) -> None:
        """Forget what was kept, where rounded weights have changed since."""
        self.kept.clear()

    def _inputs(self, group: Group) -> Iterator[torch.Tensor]:
        """What the linears of ``group`` are given [tokens, columns] float32, pack by pack."""
        name = group.linears[0]
        reached = []
        for number, pack in enumerate(self.packs):
            with self._resumed(number):
                x = self._input(name, pack)
            if name in BRANCHES:
                reached.append(x.to(pack[0].hidden.device))
            yield x[0].float()
        if name in BRANCHES:
            self.kept[name] = reached

    def _input(self, name: str, pack: Sequence[Streamed]) -> torch.Tensor:
        """What linear ``name`` is given when ``pack`` enters the layer; the run ends there."""
        seen: list[torch.Tensor] = []

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        # Last of the module's hooks, so that an online transform before it has run already.
        handle = linear(self.layer, name).register_forward_pre_hook(hook)
        try:
            run_pack(self.layer, self.index, pack)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def _resumed(self, number: int) -> Iterator[None]:
        """While open, branches whose last linear pack ``number`` has reached begin there."""
        branches = {name: self.layer.get_submodule(BRANCHES[name]) for name in self.kept}
        try:
            for name, inputs in self.kept.items():
                # Attention gives its weights beside the output, which no layer reads.
                end = _End(linear(self.layer, name), inputs[number].to(self.device), pair=name == "self_attn.o_proj")
                setattr(self.layer, BRANCHES[name], end)
            yield
        finally:
            for name, branch in branches.items():
                setattr(self.layer, BRANCHES[name], branch)


class _End(nn.Module):
    """Stands where a branch was: its last linear alone, past the hooks that ran before the input was kept."""

    def __init__(self, last: nn.Linear, x: torch.Tensor, pair: bool) -> None:
        super().__init__()
        self.last, self.x, self.pair = last, x, pair

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        out = self.last.forward(self.x)
        return (out, None) if self.pair else out
