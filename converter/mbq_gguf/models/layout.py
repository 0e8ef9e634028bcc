"""Where the matrices of a decoder layer are and what reads what: the words of models/layouts.py, which has a table a family.

A *site* is one activation that matrices read. It is the unit of Hessians, channel factors and token weights; what needs something for
each activation (a static scale, say) adds it here.

A *reader* of a site is a matrix that multiplies it: a linear, or rows of a fused one (:class:`Fused`). Readers have names that they would
have as linears of their own, so that sites, absorbers and everything that calibrates and rounds are the same for both kinds. Experts are
linears already (models/experts.py); a layout tells where they are, and has sites for as many as a layer has (:meth:`Layout.of`).
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

    ``absorber`` is the norm or linear before it that can take the inverse of channel factors (None: factors cannot be folded here);
    ``inspected`` is the module whose output tells what an error in the readers does; ``branch`` is the name of the site's branch.
    ``heads`` is where the layer keeps the channels of a head, where llama.cpp moves the readers' columns by heads (None: it does not).
    ``expert`` is the number of the expert that the readers belong to (None: all tokens pass them); inputs of sites of one ``stage`` do not
    depend on one another's readers.
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
    """A linear whose output is cut into ``parts``, each a reader: the first part's rows come first, and so on.

    The first part has as many rows as the linear ``first`` has columns (queries, as many as o_proj takes), the others share the rest
    alike; with ``first`` None all parts are alike (gate and up).
    """

    linear: str
    parts: tuple[str, ...]
    first: str | None = None

    def rows(self, module: nn.Module) -> dict[str, slice]:
        """Where each part lies in the linear of the layer ``module``. ValueError where its rows cannot be shared out so."""
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
    """A part of a layer that ends by writing into the residual stream: ``module`` holds it, ``writer`` is its last linear, or the module
    itself where many linears write.

    ``pair``: the module gives a second value beside its output (attention's weights), which no layer reads.
    """

    name: str
    module: str
    writer: str
    pair: bool = False


@dataclass(frozen=True)
class Layout:
    """A kind of decoder layer. Sites are in the order in which they are computed.

    ``norms`` stand before a branch; ``norms_after`` between a branch and the residual stream. ``projector`` is the linears that write
    image features into the residual stream, the end of their names in the model as a regular expression (None where it is not known).
    ``unturned`` says why a rotation cannot pass although norms and projector are known. ``alone``: tokens meet elsewhere than in attention,
    so samples cannot be run side by side. ``variants`` are the layouts of single layers where these differ (:meth:`of`): the layout itself
    then has the sites of all.
    ``embeds``: rows of the embeddings are among them, in the vision file (a token between rows of a picture); ``newline`` is a parameter
    of the model that stands there instead. ``fused`` tells of readers that are no linears of their own. ``experts`` is where a layer's
    experts are, of which sites know once a layer is at hand.
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
        """The layout of the layer ``module``: itself, or the variant that it is, with sites for each of its experts."""
        found = next((variant for variant in self.variants if variant.fault(module) is None), self)
        return with_experts(found, len(experts)) if isinstance(experts := _part(module, found.experts), Experts) else found

    @property
    def stacks(self) -> tuple[str, ...]:
        """Where layers may have experts."""
        return tuple(dict.fromkeys(layout.experts for layout in (self, *self.variants) if layout.experts))

    @property
    def readers(self) -> tuple[str, ...]:
        """Every matrix that is quantised, by its name in the layer."""
        return tuple(name for site in self.sites for name in site.readers)

    def fused_of(self, reader: str) -> Fused | None:
        """The fused linear that holds ``reader``, or None."""
        return next((fused for fused in self.fused if reader in fused.parts), None)

    def linear_of(self, reader: str) -> str:
        """The linear that holds ``reader``: itself, or the fused one."""
        fused = self.fused_of(reader)
        return fused.linear if fused else reader

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that is quantised, as the checkpoint has them."""
        return tuple(dict.fromkeys(self.linear_of(name) for name in self.readers))

    def by_linear(self, values: Mapping[str, Value]) -> dict[str, list[Value]]:
        """``values`` by reader as lists by linear, in the order of its rows."""
        parts = {fused.linear: fused.parts for fused in self.fused}
        return {name: [values[part] for part in parts.get(name, (name,))] for name in self.linears}

    @property
    def last(self) -> Site:
        """The site that is computed last."""
        return self.sites[-1]

    def site(self, name: str) -> Site:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    def no_equalisation(self) -> str | None:
        """Why channels cannot be equalised, or None."""
        return None if any(site.absorber for site in self.sites) else "nothing before its matrices takes channel factors"

    def no_rotation(self) -> str | None:
        """Why the residual stream cannot be rotated, or None. A norm after a branch has a gain of its own, which no linear can take."""
        if self.norms_after:
            return f"its layers have norms after their blocks ({', '.join(self.norms_after)})"
        if self.unturned:
            return self.unturned
        if self.projector is None:
            return "it is not known which linear brings image features into the decoder"
        return None

    def fault(self, module: nn.Module) -> str | None:
        """What keeps ``module`` from being a layer of this kind, or None."""
        if self.variants:
            faults = [variant.fault(module) for variant in self.variants]
            return None if None in faults else faults[0]
        modules = dict(module.named_modules())
        for name in self.linears:
            if not isinstance(modules.get(name), nn.Linear):
                return f"has no linear {name}"
        if self.experts and not isinstance(modules.get(self.experts), Experts):
            return f"has no experts {self.experts} of gate, up and down alone"
        for fused in self.fused:
            try:
                fused.rows(module)
            except ValueError as error:
                return f"has a linear {fused.linear} that is no {', '.join(fused.parts)} ({error})"
        norms = (*self.norms, *self.norms_after)
        for name in norms:
            if not _is_norm(modules.get(name)):
                return f"has no norm {name}"
        for name, child in module.named_children():
            if _is_norm(child) and name not in norms:
                return f"has a norm {name} that no layout knows"
        return None


@cache
def with_experts(layout: Layout, count: int) -> Layout:
    """``layout`` with sites for ``count`` experts behind its others: what all of them read first, then what each writes from."""
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
