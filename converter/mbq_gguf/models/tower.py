"""Where the matrices of a vision tower are, what enters its residual stream and what reads its end: the words of models/towers.py.

Names in a layout are ends: blocks' are relative to a block, entries' to the tower, exits' to what holds the tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

BLOCK = 32  # weights of a Q4_0 or Q8_0 block: what a row must be a multiple of
PADDED = 128  # to a multiple of which feed-forward widths are padded that are none of a block


@dataclass(frozen=True)
class TowerSite:
    """An activation of a block: the ``norm`` that gives it (None: a branch's inside) and the linears that read it."""

    norm: str | None
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Exit:
    """What reads the end of the stream in each module whose name matches ``module``: ``norm``, then ``readers``, then ``later`` linears,
    one group behind the other. ``bare``: readers multiply the stream itself."""

    module: str
    norm: str | None
    readers: tuple[str, ...]
    later: tuple[tuple[str, ...], ...] = ()
    bare: bool = False


@dataclass(frozen=True)
class TowerLayout:
    """A kind of tower. ``path`` is its name in what holds it, ``blocks`` that of its blocks.

    ``values`` is the linear whose last rows, as many as it has columns, are attention's values; ``scales`` are (parameter, the linear
    before it) where a block multiplies a branch's output; ``entries`` are the convolution, embeddings and parameters whose channels are
    the stream's; ``plain`` is a module that must be an Identity for a rotation; ``unturned`` says why none passes. ``cut``:
    the model's ``vision_feature_layer`` says how many blocks are read, and the file has no others.
    """

    path: str
    blocks: str
    sites: tuple[TowerSite, ...]
    values: str
    entries: tuple[str, ...]
    exits: tuple[Exit, ...]
    scales: tuple[tuple[str, str], ...] = ()
    plain: str | None = None
    unturned: str | None = None
    cut: bool = False

    @property
    def writers(self) -> tuple[str, str]:
        """The linears that write into the stream: attention's output and the feed-forward's."""
        return self.sites[1].readers[0], self.sites[3].readers[0]

    @property
    def readers(self) -> tuple[str, ...]:
        """Every linear of a block."""
        return tuple(name for site in self.sites for name in site.readers)


@dataclass(frozen=True)
class Tower:
    """The tower of a model: ``holder`` holds it."""

    layout: TowerLayout
    holder: nn.Module

    @property
    def module(self) -> nn.Module:
        """The tower itself."""
        return self.holder.get_submodule(self.layout.path)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks in order, as many as the file has."""
        blocks = list(self.module.get_submodule(self.layout.blocks).children())
        config: Any = self.holder.config
        read = int(config.vision_feature_layer) if self.layout.cut else -1
        return blocks[: read % (len(blocks) + 1)]

    @property
    def width(self) -> int:
        """Channels of its residual stream."""
        return linear(self.blocks[0], self.layout.writers[0]).out_features

    def block_name(self, index: int) -> str:
        """The end of block ``index``'s name in a checkpoint: without what holds it, of which releases of transformers differ."""
        return f"{self.layout.blocks}.{index}"

    def exits(self) -> Iterator[tuple[Exit, str, nn.Module]]:
        """Every exit with the name and the module of each place that it stands for."""
        for found in self.layout.exits:
            for name, module in self.holder.named_modules():
                if re.fullmatch(found.module, name):
                    yield found, name, module

    def exit_groups(self) -> Iterator[dict[str, nn.Linear]]:
        """The linears behind the blocks by name, groups in the order in which they are computed; convolutions keep their type."""
        places = list(self.exits())
        for step in range(max((1 + len(place.later) for place, _, _ in places), default=0)):
            group = {}
            for place, name, _ in places:
                for reader in (place.readers, *place.later)[step] if step <= len(place.later) else ():
                    found = self.holder.get_submodule(joined(name, reader))
                    if isinstance(found, nn.Linear):
                        group[joined(name, reader)] = found
            yield group

    def no_rotation(self) -> str | None:
        """Why its stream cannot be rotated, or None."""
        plain = self.layout.plain
        if plain and not isinstance(self.module.get_submodule(plain), nn.Identity):
            return f"its stream ends in a norm ({plain}) behind which another one stands"
        return self.layout.unturned

    def no_centring(self) -> str | None:
        """Why LayerNorm cannot become RMSNorm, or None."""
        if not isinstance(self.blocks[0].get_submodule(self.layout.sites[0].norm or ""), nn.LayerNorm):
            return "its norms take no mean"
        for place, name, _ in self.exits():
            norm = self.holder.get_submodule(joined(name, place.norm)) if place.norm else None
            if isinstance(norm, nn.LayerNorm) and norm.normalized_shape[0] != self.width:
                return f"{joined(name, place.norm or '')} takes one mean of several patches"
            if place.bare:
                return f"{name} reads the stream with its mean"
        return self.no_rotation()


def linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear ``name`` of ``module``."""
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def joined(module: str, name: str) -> str:
    """The name of ``name`` in ``module``."""
    return f"{module}.{name}" if module else name
