"""Second moments of a site's inputs in the model whose earlier layers and sites are rounded, and of the original's inputs relative to
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.observe import TokenWeights, Watch
from mbq_gguf.calibration.spill import kept
from mbq_gguf.calibration.stream import pass_batch, run_batch, split_back
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.sums import Sum, root_weighted
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Branch, Site
from mbq_gguf.parallel import Parts, parallel_map
from mbq_gguf.threads import Workers


@dataclass
class Moments:
    """With x the input in the rounded model and y the original one: ``hessian`` = sum w x^T x, ``cross`` = sum w (y - x)^T x, both
    [columns, columns] float32 on the device.

    Cross moments exist only on request. For a site with a :meth:`Layer.narrow_writer` W, only their product with W is needed, and
    ``written`` = sum w (W y)^T x [rows, columns] is stored instead: the original layer has computed W y anyway, and W cross = written - W
    hessian takes as many products per entry of x as W has rows, not columns (576 instead of 1536 on the reference VLM, 3584 instead of
    18944 in a 7B).
    """

    hessian: torch.Tensor
    cross: torch.Tensor | None = None
    written: torch.Tensor | None = None

    def of_rows(self, rows: slice) -> Moments:
        """The same for some rows of the matrices."""
        return self if self.written is None else replace(self, written=self.written[rows])


class Replay:
    """Runs streams through one layer while it is being rounded.

    Sites must be requested in the layer's order, each after all earlier ones are rounded; a run stops at the site's first linear. When the
    last site of a branch (attention, feed-forward) is reached, its input no longer changes. It is kept, and later runs enter the branch
    there; the first of these replaces it by the branch's output. So every linear runs once per batch, not up to four times. If the layer
    has changed before a kept input after all, RuntimeError is raised. With several processes, each keeps the results of its own batches.

    ``workers`` run batches and sum tiles in parallel, each with its share of the cores: the moments of a layer of the reference VLM then
    take two cores 4.6 to 4.8 processor seconds, and 5.1 if both share every operation. Experts remember their latest run, so only one
    worker runs them.
    """

    def __init__(self, layer: Layer, streams: Sequence[Streamed], workers: int = 1) -> None:
        self.layer, self.streams, self.count = layer, streams, workers if layer.experts is None else 1
        self.batches = list(batches(streams, layer))
        self.branches = {branch.writer: branch for branch in layer.layout.branches}
        self.routed: dict[str, Moments] = {}  # moments of experts whose stage has been run, by site
        self.summed = 0  # bytes of the current sums, which rounding takes over
        self.kept: dict[str, dict[int, torch.Tensor]] = {}  # inputs by the last linear's name and batch number [1, tokens, columns]
        self.outputs: dict[str, dict[int, torch.Tensor]] = {}  # that linear's outputs, which replace the inputs
        self.handed: dict[int, Parts] = {}  # keys and values for later layers, by batch number, once a run has computed them
        self.kept_with: dict[str, list[tuple[int, int]]] = {}  # the parameters that influenced them, see _decisive

    @torch.no_grad()
    def moments(self, site: Site, weights: TokenWeights, originals: Sequence[torch.Tensor] | None = None) -> Moments:
        """The moments of ``site``'s input.

        ``originals`` are from the original model, as in :class:`Observed`, one [tokens, columns] per stream (those of other processes'
        batches are ignored); without them there are no cross moments.
        """
        if site.expert is not None:
            if site.name not in self.routed:
                self.routed = self._of_experts(site.stage, weights)
            return self.routed.pop(site.name)
        rest = iter(originals or ())
        of_batches = [list(islice(rest, len(batch))) for batch in self.batches]
        writes = self.layer.narrow_writer(site) is not None

        def rooted_input(number: int, x: torch.Tensor) -> Parts:
            of_tokens = torch.cat([weights(stream, site) for stream in self.batches[number]])
            parts = {"rooted": root_weighted(x, of_tokens)}
            if originals is not None:
                original = torch.cat(of_batches[number]).to(x)
                parts["original"] = root_weighted(original if writes else original.sub_(x), of_tokens)
            return parts

        self.summed = 0
        square: Sum | None = None
        cross: Sum | None = None
        for parts in self._of_inputs(site, rooted_input):
            if square is None:
                square = Sum.square_of(parts["rooted"])
                cross = None if originals is None else Sum.like(parts["original"], parts["rooted"])
                self.summed = sum(each.total.nbytes for each in (square, cross) if each is not None)
            large = [] if cross is None else cross.adding(parts["original"], parts["rooted"])
            self._do(large + square.adding_square(parts["rooted"]))  # the largest first, so that workers finish together
        assert square is not None
        hessian, crossed = square.whole_square(), None if cross is None else cross.whole()
        return Moments(hessian, written=crossed) if writes else Moments(hessian, crossed)

    def _of_experts(self, stage: str, weights: TokenWeights) -> dict[str, Moments]:
        """The moments of all sites of a ``stage`` of the experts, by name, from a single run."""
        sites = [site for site in self.layer.sites if site.expert is not None and site.stage == stage]
        found: dict[str, Sum] = {}
        self._check_kept()

        def rooted_inputs(number: int) -> Parts:
            batch = self.batches[number]
            with self._resumed(self.layer, number), Watch(self.layer, sites) as watch:
                run_batch(self.layer, batch)
            of_tokens = torch.cat([weights(stream, sites[0]) for stream in batch]).to(self.layer.device)
            reached = [site for site in sites if site.name in watch.inputs]
            inputs = ((site, watch.inputs.pop(site.name)[0].float()) for site in reached)  # released one by one
            return {site.name: root_weighted(x, self.layer.row_weights(site, of_tokens)) for site, x in inputs}

        for _, parts in parallel_map(range(len(self.batches)), rooted_inputs):
            while parts:  # not kept beside those of the next batch
                name, rooted = parts.popitem()
                found.setdefault(name, Sum.square_of(rooted)).add_square(rooted)
        return {name: Moments(found.pop(name).whole_square()) for name in list(found)}

    @torch.no_grad()
    def advance(self) -> None:
        """Run the streams to the next layer, in place, when the whole layer is rounded."""
        self._check_kept()

        def run(layer: Layer, number: int) -> Parts:
            with self._resumed(layer, number):
                return self.handed.get(number, {}) | pass_batch(layer, self.batches[number])

        for number, parts in self._of_batches(run):
            split_back(self.batches[number], parts)
        self.kept.clear()
        self.outputs.clear()
        self.handed.clear()

    def _of_inputs(self, site: Site, compute: Callable[[int, torch.Tensor], Parts]) -> Iterator[Parts]:
        """Call ``compute`` for each batch with its number and the input of the linears of ``site`` [tokens, columns] float32."""
        name = site.readers[0]
        reached: dict[int, torch.Tensor] = {}
        self._check_kept()

        def run(layer: Layer, number: int) -> Parts:
            batch = self.batches[number]
            handed: Parts = {}
            with self._resumed(layer, number):
                x = layer.input_of(name, partial(run_batch, layer, batch, handed))
            if handed:  # computed again by each run, until attention is entered after them
                self.handed[number] = {name: kept(pair) for name, pair in handed.items()}
            if name in self.branches:
                reached[number] = kept(x, there=self.summed)
            return compute(number, x[0].float())

        for _, parts in self._of_batches(run):
            yield parts
        if name in self.branches:
            self.kept[name], self.outputs[name], self.kept_with[name] = reached, {}, self._decisive(name)

    @cached_property
    def workers(self) -> Workers[Layer] | None:
        """Copies of the layer, made when first requested. Rounding changes their weights too, because they share the tensors."""
        return Workers([self.layer.twin() for _ in range(self.count)]) if self.count > 1 else None

    def _of_batches(self, run: Callable[[Layer, int], Parts]) -> Iterator[tuple[int, Parts]]:
        """The number of each batch, in order, with the result of ``run``; as many at a time as there are workers or processes."""
        numbers = range(len(self.batches))
        if not self.workers:
            return parallel_map(numbers, partial(run, self.layer))
        return zip(numbers, self.workers.each(numbers, run), strict=True)

    def _do(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run all of ``tasks``, which are independent of one another."""
        if self.workers:
            list(self.workers.each(tasks, lambda _, task: task()))
            return
        for task in tasks:
            task()

    def _decisive(self, writer: str) -> list[tuple[int, int]]:
        """Identity and version (which PyTorch increments with each write, except through ``data``) of every parameter that influences what
        is kept for the last linear ``writer``. Comparing values would make the host wait for the GPU eight times per layer.
        """
        place = next(place for place, site in enumerate(self.layer.sites) if writer in site.readers)
        own = 1 if self.outputs.get(writer) else 0
        later = {self.layer.layout.linear_of(name) for site in self.layer.sites[place + own :] for name in site.readers}
        parameters = self.layer.module.named_parameters()
        return [(id(value), value._version) for name, value in parameters if name.rpartition(".")[0] not in later]

    def _check_kept(self) -> None:
        for name in self.kept:
            if self.kept_with[name] != self._decisive(name):
                raise RuntimeError(f"weights have changed since {name} was reached: make a new Replay")

    def _norms_before(self, branch: Branch) -> list[str]:
        """The norm that only ``branch`` reads, which can therefore absorb factors; empty if there is none."""
        layout = self.layer.layout
        first = next(site for site in layout.sites if site.branch == branch.name)
        return [norm for norm in layout.norms if norm == first.absorber]

    @contextmanager
    def _resumed(self, layer: Layer, number: int) -> Iterator[None]:
        """While open, branches of ``layer`` whose last linear batch ``number`` has reached start there, or after it. Norms that nobody else
        reads are skipped then (four of ten norm calls, 2 % of a layer's time).
        """
        replays: dict[str, _Replay] = {}
        stand_ins: dict[str, nn.Module] = {}
        for name, x in self.kept.items():
            branch = self.branches[name]
            replays[name] = _Replay(layer.holder(name), x.get(number), self.outputs[name].get(number), branch.pair)
            stand_ins |= {branch.module: replays[name]} | dict.fromkeys(self._norms_before(branch), nn.Identity())
        whole = {name: layer.part(name) for name in stand_ins}
        try:
            for name, module in stand_ins.items():
                setattr(layer.module, name, module)
            yield
        finally:
            for name, module in whole.items():
                setattr(layer.module, name, module)
        for name, replay in replays.items():
            if replay.out is not None and self.kept[name].pop(number, None) is not None:
                first = not self.outputs[name]
                self.outputs[name][number] = kept(replay.out, there=self.summed)
                if first:
                    self.kept_with[name] = self._decisive(name)


class _Replay(nn.Module):
    """Replaces a branch: only its last linear, without the hooks that ran before the input ``x`` was kept, or its output."""

    def __init__(self, last: nn.Linear, x: torch.Tensor | None, out: torch.Tensor | None, pair: bool) -> None:
        super().__init__()
        self.last, self.x, self.out, self.pair = last, x, out, pair

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        device = self.last.weight.device
        if self.out is None:
            assert self.x is not None
            self.out = self.last.forward(self.x.to(device))
        out = self.out.to(device)
        return (out, None) if self.pair else out
