"""Describes where the matrices of a decoder layer are and which activation each reads; models/layouts.py has the families' layouts.

A *site* is one activation that matrices read. Hessians, channel factors, token weights and static ranges are per site.

A *reader* of a site is a matrix that multiplies it: a linear, or some rows of a fused linear (:class:`Fused`). Parts of a fused linear have
the names that separate linears would have, so that sites, absorbers, calibration and rounding treat both kinds alike. Experts are separate
linears (models/experts.py); a layout says where they are, and :meth:`Layout.of` adds sites for each expert of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import TypeVar

import torch
from torch import nn

from mbq_gguf.models.experts import Experts

Value = TypeVar("Value")


@dataclass(frozen=True)
class Site:
    """An activation and its ``readers``, the matrices that multiply it, by their names in the layer.

    ``absorber``: the preceding norm or linear that can absorb inverse channel factors (None: factors cannot be folded here).
    ``inspected``: the module at whose output the effect of errors in the readers is measured. ``branch``: the name of the site's branch.
    ``heads``: the attribute that holds the channels per head, if llama.cpp permutes the readers' columns by heads (None: it does not).
    ``expert``: the index of the readers' expert (None: all tokens pass through them). ``stage``: inputs of sites of the same stage do not
    depend on each other's readers.
    """

    name: str
    readers: tuple[str, ...]
    absorber: str | None
    inspected: str
    branch: str
    heads: str | None = None
    expert: int | None = None
    stage: str = ""


@dataclass(frozen=True)
class Fused:
    """A linear whose output is split into ``parts``, in order, each of which is a reader.

    The first part has as many rows as the linear ``first`` has columns (queries: as many as o_proj reads), and the others share the rest
    equally. With ``first`` None all parts have equal size (gate and up).
    """

    linear: str
    parts: tuple[str, ...]
    first: str | None = None

    def rows(self, module: nn.Module) -> dict[str, slice]:
        """The rows of each part in the linear of layer ``module``. Raises ValueError if the rows cannot be split like this."""
        whole = _linear(module, self.linear).out_features
        sizes = [_linear(module, self.first).in_features] if self.first else []
        others = len(self.parts) - len(sizes)
        each, left = divmod(whole - sum(sizes), others)
        if left or each <= 0:
            raise ValueError(f"{whole} rows are not {' + '.join(map(str, (*sizes, f'{others} alike')))}")
        ends = list(accumulate((*sizes, *[each] * others)))
        return {part: slice(start, end) for part, start, end in zip(self.parts, (0, *ends), ends, strict=False)}


@dataclass(frozen=True)
class Branch:
    """A part of a layer that ends by adding to the residual stream: ``module`` contains it, ``writer`` is its last linear, or the module
    itself if many linears write.

    ``pair``: the module returns a second value besides its output (attention's weights), which no layer uses.
    """

    name: str
    module: str
    writer: str
    pair: bool = False


@dataclass(frozen=True)
class Layout:
    """A kind of decoder layer. Sites are in order of computation.

    ``norms``: norms before a branch. ``norms_after``: norms between a branch and the residual stream.
    ``projector``: the linears that write image features to the residual stream, as a regular expression for the end of their names in the
    model (None: unknown). ``embeds``: the image features also contain rows of the embeddings, which the vision file stores (a token between
    the rows of a picture); ``newline``: a parameter of the model that is used for this instead.
    ``unturned``: why the residual stream cannot be rotated although norms and projector are known. ``alone``: tokens interact outside of
    attention too, so samples cannot be batched. ``variants``: the layouts of individual layers, if they differ (:meth:`of`); the layout
    itself then has the sites of all of them. ``fused``: the fused linears. ``experts``: where a layer's experts are; their sites are added
    by :meth:`of`.
    """

    sites: tuple[Site, ...]
    branches: tuple[Branch, ...]
    norms: tuple[str, ...]
    norms_after: tuple[str, ...] = ()
    projector: str | None = None
    embeds: bool = False
    newline: str | None = None
    unturned: str | None = None
    alone: bool = False
    variants: tuple[Layout, ...] = ()
    fused: tuple[Fused, ...] = ()
    experts: str | None = None

    def of(self, module: nn.Module) -> Layout:
        """The layout of layer ``module``: this one or the variant that matches, with sites for each of its experts."""
        found = next((variant for variant in self.variants if variant.fault(module) is None), self)
        return with_expert_sites(found, len(experts)) if isinstance(experts := _part(module, found.experts), Experts) else found

    @property
    def stacks(self) -> tuple[str, ...]:
        """The places where layers may have experts."""
        return tuple(dict.fromkeys(layout.experts for layout in (self, *self.variants) if layout.experts))

    @property
    def readers(self) -> tuple[str, ...]:
        """All matrices that are quantised, by their names in the layer."""
        return tuple(name for site in self.sites for name in site.readers)

    def fused_of(self, reader: str) -> Fused | None:
        """The fused linear that contains ``reader``, or None."""
        return next((fused for fused in self.fused if reader in fused.parts), None)

    def linear_of(self, reader: str) -> str:
        """The linear that contains ``reader``: the reader itself or the fused one."""
        fused = self.fused_of(reader)
        return fused.linear if fused else reader

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that are quantised, under the checkpoint's names."""
        return tuple(dict.fromkeys(self.linear_of(name) for name in self.readers))

    def by_linear(self, values: Mapping[str, Value]) -> dict[str, list[Value]]:
        """``values`` by reader, regrouped by linear: a list in the order of its rows."""
        parts = {fused.linear: fused.parts for fused in self.fused}
        return {name: [values[part] for part in parts.get(name, (name,))] for name in self.linears}

    @property
    def last(self) -> Site:
        """The last site in order of computation."""
        return self.sites[-1]

    def site(self, name: str) -> Site:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    def no_equalisation(self) -> str | None:
        """Why channels cannot be equalised, or None."""
        return None if any(site.absorber for site in self.sites) else "nothing before its matrices can absorb channel factors"

    def no_rotation(self) -> str | None:
        """Why the residual stream cannot be rotated, or None. The gain of a norm after a branch cannot be folded into any linear."""
        if self.norms_after:
            return f"its layers have norms after their blocks ({', '.join(self.norms_after)})"
        if self.unturned:
            return self.unturned
        if self.projector is None:
            return "the linear that writes image features into the decoder is unknown"
        return None

    def fault(self, module: nn.Module) -> str | None:
        """Why ``module`` is not a layer of this kind, or None."""
        if self.variants:
            faults = [variant.fault(module) for variant in self.variants]
            return None if None in faults else faults[0]
        modules = dict(module.named_modules())
        for name in self.linears:
            if not isinstance(modules.get(name), nn.Linear):
                return f"has no linear {name}"
        if self.experts and not isinstance(modules.get(self.experts), Experts):
            return f"has no experts {self.experts} of gate, up and down only"
        for fused in self.fused:
            try:
                fused.rows(module)
            except ValueError as error:
                return f"has a linear {fused.linear} that does not consist of {', '.join(fused.parts)} ({error})"
        norms = (*self.norms, *self.norms_after)
        for name in norms:
            if not _is_norm(modules.get(name)):
                return f"has no norm {name}"
        for name, child in module.named_children():
            if _is_norm(child) and name not in norms:
                return f"has a norm {name} that no layout describes"
        return None


@cache
def with_expert_sites(layout: Layout, count: int) -> Layout:
    """``layout`` with sites for ``count`` experts appended: first the inputs of gate and up of all, then those of down."""
    stack = layout.experts
    gate_up = (
        Site(f"gate_up.{n}", (f"{stack}.{n}.gate_proj", f"{stack}.{n}.up_proj"), None, f"{stack}.{n}", "mlp", None, n, "gate_up")
        for n in range(count)
    )
    down = (Site(f"down.{n}", (f"{stack}.{n}.down_proj",), None, f"{stack}.{n}.down_proj", "mlp", None, n, "down") for n in range(count))
    return replace(layout, sites=(*layout.sites, *gate_up, *down))


def _part(module: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else module.get_submodule(name)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _is_norm(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1
