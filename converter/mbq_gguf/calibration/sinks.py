"""Finds tokens that act as attention sinks: a few of their activations are so large that a range including them is useless for the others.

They are found by measurement in the original model, before rotation spreads their large channels over all, and are described by what a
runtime knows about a token before it computes: its position or its id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.magnitudes import Magnitudes
from mbq_gguf.calibration.observe import Watch
from mbq_gguf.calibration.stream import pass_batch, split_back, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.loaded import LoadedModel

BEYOND = 20.0  # a token is an outlier if it exceeds this many times its class's QUANTILE in any layer and site
QUANTILE = 0.999
SHARE = 0.5  # share of the tokens at a position, or with an id, that must be outliers for all of them to count as sinks
POSITIONS = 8  # positions that are considered; sinks are at the start
LEAST = 2  # minimum number of outliers for an id to be a sink


@dataclass(frozen=True)
class Sinks:
    """Sinks by ``positions``, counted from the start of a sequence, and by ids of text ``tokens``."""

    positions: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    def of(self, stream: Streamed) -> torch.Tensor:
        """Which tokens of ``stream`` are sinks, bool [tokens]."""
        found = torch.isin(stream.ids, torch.tensor(self.tokens, dtype=stream.ids.dtype)) & ~stream.vision
        found[[place for place in self.positions if place < len(found)]] = True
        return found


def find_sinks(loaded: LoadedModel, streams: Sequence[Streamed], progress: Callable[[int, int], None] = lambda done, total: None) -> Sinks:
    """The positions and ids that cover most of the outliers among ``streams``, which are inputs of the first layer."""
    return name_sinks(streams, find_outliers(loaded, streams, progress))


@torch.no_grad()
def find_outliers(
    loaded: LoadedModel, streams: Sequence[Streamed], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[torch.Tensor]:
    """Which tokens have, in any layer, an activation far above all others of their class; bool [tokens] per stream.

    Copies of ``streams``, which are inputs of the first layer, run through the model.
    """
    running = [replace(stream) for stream in streams]
    vision = torch.cat([stream.vision for stream in streams])
    outlier = torch.zeros(len(vision), dtype=torch.bool)
    for index in range(len(loaded.decoder.layers)):
        layer = working_layer(loaded, index)
        sizes: dict[str, list[torch.Tensor]] = {site.name: [] for site in layer.sites}
        counted = {(site.name, seen): Magnitudes() for site in layer.sites for seen in (False, True)}
        for batch in batches(running, layer):
            with Watch(layer) as watch:
                parts = pass_batch(layer, batch)
            mask = torch.cat([stream.vision for stream in batch]).to(layer.device)
            for site in layer.sites:
                x = watch.inputs[site.name][0]
                sizes[site.name].append(x.abs().amax(dim=1).float().cpu())
                for seen in (False, True):
                    counted[site.name, seen].add(x[mask == seen])
            split_back(batch, parts)
        for site in layer.sites:
            size = torch.cat(sizes[site.name])
            for seen in (False, True):
                limit = BEYOND * counted[site.name, seen].quantile(QUANTILE)
                outlier |= (vision == seen) & (size > limit)
        progress(index + 1, len(loaded.decoder.layers))
    return list(torch.split(outlier, [len(stream.ids) for stream in streams]))


def name_sinks(streams: Sequence[Streamed], outliers: Sequence[torch.Tensor]) -> Sinks:
    """Positions and ids most of whose tokens are ``outliers`` (bool [tokens] per stream).

    After a picture, a token's position is not the number of tokens before it, so only the text before the first picture counts for
    positions.
    """
    text = [int(stream.vision.int().argmax()) if stream.vision.any() else len(stream.ids) for stream in streams]
    positions = []
    for place in range(POSITIONS):
        here = [bool(outlier[place]) for outlier, end in zip(outliers, text, strict=True) if place < end]
        if here and sum(here) >= SHARE * len(here):
            positions.append(place)
    at_positions = Sinks(tuple(positions))
    rest = [~stream.vision & ~at_positions.of(stream) for stream in streams]
    ids = torch.cat([stream.ids[keep] for stream, keep in zip(streams, rest, strict=True)])
    hit = torch.cat([outlier[keep] for outlier, keep in zip(outliers, rest, strict=True)])
    tokens = [
        token for token in torch.unique(ids[hit]).tolist() if (of := hit[ids == token]).sum() >= LEAST and of.sum() >= SHARE * len(of)
    ]
    return Sinks(tuple(positions), tuple(tokens))
