"""Describes where the matrices of a vision tower are, what writes its residual stream first, and what reads its end.

models/towers.py has the families' layouts. Names in a layout are relative: those of blocks to a block, those of entries to the tower, and
those of exits to the module that holds the tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

BLOCK = 32  # weights per Q4_0 or Q8_0 block; rows must be a multiple of it
PADDED = 128  # feed-forward widths that are not a multiple of BLOCK are padded to a multiple of this


@dataclass(frozen=True)
class TowerSite:
    """An activation of a block: the ``norm`` that produces it (None: it is inside of a branch) and the linears that read it."""

    norm: str | None
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Exit:
    """What reads the end of the residual stream, in each module whose name matches ``module``: ``norm``, then ``readers``, then the groups
    of ``later`` linears in order. ``bare``: the readers multiply the stream itself, without a norm."""

    module: str
    norm: str | None
    readers: tuple[str, ...]
    later: tuple[tuple[str, ...], ...] = ()
    bare: bool = False


@dataclass(frozen=True)
class TowerLayout:
    """A kind of tower. ``path`` is its name in the module that holds it, ``blocks`` the name of its blocks.

    ``values``: the linear whose last rows, as many as it has columns, are attention's values. ``scales``: (parameter, the linear before
    it), if a block scales a branch's output. ``entries``: the convolution, embeddings and parameters that write the residual stream first.
    ``plain``: a module that must be an Identity for a rotation. ``unturned``: why the stream cannot be rotated. ``cut``: the model's
    ``vision_feature_layer`` says how many blocks are used, and the file has only those.
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
        """The linears that write to the residual stream: the outputs of attention and of the feed-forward."""
        return self.sites[1].readers[0], self.sites[3].readers[0]

    @property
    def readers(self) -> tuple[str, ...]:
        """All linears of a block."""
        return tuple(name for site in self.sites for name in site.readers)


@dataclass(frozen=True)
class Tower:
    """The vision tower of a model; ``holder`` is the module that contains it."""

    layout: TowerLayout
    holder: nn.Module

    @property
    def module(self) -> nn.Module:
        """The tower's module."""
        return self.holder.get_submodule(self.layout.path)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks in order, without those that the file leaves out."""
        blocks = list(self.module.get_submodule(self.layout.blocks).children())
        config: Any = self.holder.config
        read = int(config.vision_feature_layer) if self.layout.cut else -1
        return blocks[: read % (len(blocks) + 1)]

    @property
    def width(self) -> int:
        """The number of channels of its residual stream."""
        return linear(self.blocks[0], self.layout.writers[0]).out_features

    def block_name(self, index: int) -> str:
        """The end of block ``index``'s name in a checkpoint, without the prefix, which differs between releases of transformers."""
        return f"{self.layout.blocks}.{index}"

    def exits(self) -> Iterator[tuple[Exit, str, nn.Module]]:
        """Every exit, with the name and the module of each match."""
        for found in self.layout.exits:
            for name, module in self.holder.named_modules():
                if re.fullmatch(found.module, name):
                    yield found, name, module

    def exit_groups(self) -> Iterator[dict[str, nn.Linear]]:
        """The linears after the blocks, by name, as groups in order of computation; convolutions are not included."""
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
        """Why its residual stream cannot be rotated, or None."""
        plain = self.layout.plain
        if plain and not isinstance(self.module.get_submodule(plain), nn.Identity):
            return f"its stream ends in a norm ({plain}) that another norm follows"
        return self.layout.unturned

    def no_centring(self) -> str | None:
        """Why LayerNorm cannot become RMSNorm, or None."""
        if not isinstance(self.blocks[0].get_submodule(self.layout.sites[0].norm or ""), nn.LayerNorm):
            return "its norms do not subtract the mean"
        for place, name, _ in self.exits():
            norm = self.holder.get_submodule(joined(name, place.norm)) if place.norm else None
            if isinstance(norm, nn.LayerNorm) and norm.normalized_shape[0] != self.width:
                return f"{joined(name, place.norm or '')} takes the mean over several patches"
            if place.bare:
                return f"{name} reads the stream including its mean"
        return self.no_rotation()


def linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear called ``name`` in ``module``."""
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def joined(module: str, name: str) -> str:
    """The name of submodule ``name`` of the module called ``module``."""
    return f"{module}.{name}" if module else name
