"""Observes one decoder layer on the calibration set: the inputs of its linears and their second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.spill import kept
from mbq_gguf.calibration.stream import pass_batch, split_back
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.sums import Sum, root_weighted
from mbq_gguf.models.layer import Layer, batched
from mbq_gguf.models.layout import Site
from mbq_gguf.parallel import Parts, parallel_map
from mbq_gguf.threads import Workers

# Activations are kept only for comparison with the rounded model's, which differ by far more than this type's rounding error.
KEPT = torch.bfloat16
NONE = torch.empty(0, 1, dtype=KEPT)  # placeholder for inputs that another process keeps

TokenWeights = Callable[[Streamed, Site], torch.Tensor]  # one weight per token [tokens], float32


@dataclass
class Observed:
    """By site name: the Hessian of its input x on the device [columns, columns], which is the sum over tokens of w_t x_t x_t^T, and the
    ``originals`` on request, one [tokens, columns] per sample: the inputs, or the output of the site's :meth:`Layer.narrow_writer` without
    bias. There are none for experts, which see other tokens in the rounded model, and they are empty for samples of another process.
    """

    hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    originals: dict[str, list[torch.Tensor]] = field(default_factory=dict)


@torch.no_grad()
def observe(
    layer: Layer,
    streams: Sequence[Streamed],
    *,
    hessian_weights: TokenWeights | None,
    keep_originals: bool = False,
    workers: int = 1,
) -> Observed:
    """Run ``streams`` through ``layer``, in place, and collect what calibration needs; no Hessians if ``hessian_weights`` is None.
    ``workers`` run batches in parallel if there is only one process.
    """
    originals: dict[str, dict[int, torch.Tensor]] = {site.name: {} for site in layer.sites}
    sums: dict[str, Sum] = {}

    def run(layer: Layer, batch: list[Streamed]) -> Parts:
        with Watch(layer) as watch:
            parts = pass_batch(layer, batch)
        for site in layer.sites:
            if site.name not in watch.inputs:  # no token of the batch has reached this expert
                continue
            x = watch.inputs.pop(site.name)[0].float()
            if keep_originals and site.expert is None:
                original = watch.written[site.name][0] if site.name in watch.written else x
                each = torch.split(kept(original, KEPT), [stream.hidden.shape[1] for stream in batch])
                originals[site.name] |= {id(stream): part for stream, part in zip(batch, each, strict=True)}
            if hessian_weights is not None:
                weights = torch.cat([hessian_weights(stream, site) for stream in batch]).to(layer.device)
                parts[f"site {site.name}"] = root_weighted(x, layer.row_weights(site, weights))
        return parts

    pieces = list(batches(streams, layer))
    for batch, parts in _by_twins(layer, workers, pieces, run) if workers > 1 else parallel_map(pieces, partial(run, layer)):
        for site in layer.sites:
            if f"site {site.name}" in parts:
                rooted = parts.pop(f"site {site.name}")  # of a layer's experts all are large
                sums.setdefault(site.name, Sum.like(rooted, rooted)).add(rooted, rooted)
        split_back(batch, parts)
    hessians = {name: found.whole() for name, found in sums.items()}
    return Observed(
        hessians, {name: [found.get(id(stream), NONE) for stream in streams] if found else [] for name, found in originals.items()}
    )


def _by_twins(
    layer: Layer, workers: int, pieces: Sequence[list[Streamed]], run: Callable[[Layer, list[Streamed]], Parts]
) -> Iterator[tuple[list[Streamed], Parts]]:
    with Workers([layer.twin() for _ in range(workers)]) as twins:
        yield from zip(pieces, twins.each(pieces, run), strict=True)


class Watch:
    """While open, keeps the latest input [1, tokens, columns] of the first linear of each of ``sites`` (None: all), by the site's name, and
    in ``written`` the output of its :meth:`Layer.narrow_writer` [1, tokens, rows], without bias.
    """

    def __init__(self, layer: Layer, sites: Sequence[Site] | None = None) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.written: dict[str, torch.Tensor] = {}
        watched = layer.sites if sites is None else sites
        self.handles = [layer.holder(site.readers[0]).register_forward_pre_hook(self._input(site.name)) for site in watched]
        writers = [(site.name, layer.narrow_writer(site)) for site in watched]
        self.handles += [writer.register_forward_hook(self._output(name)) for name, writer in writers if writer]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = batched(args[0])

        return hook

    def _output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, _args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            self.written[name] = batched(out if module.bias is None else out - module.bias)

        return hook
