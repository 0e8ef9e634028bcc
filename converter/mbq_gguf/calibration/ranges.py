"""Static ranges of activations, one for each site and class of tokens, for products with one scale per row (MSQ, MQuant, arXiv 2502.00425).

docs/format.md describes how files store them: a range for each layer, site and class, and the tokens that have none (sinks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.magnitudes import Estimator, Magnitudes
from mbq_gguf.calibration.observe import Watch
from mbq_gguf.calibration.sinks import BEYOND, QUANTILE, Sinks
from mbq_gguf.calibration.stream import pass_batch, split_back
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.formats.static_ranges import CLASSES, SITES, VERSION, VERSION_KEY
from mbq_gguf.models.layer import Layer


def static_keys(estimator: Estimator, sinks: Sinks) -> dict[str, Any]:
    """Metadata about static ranges, besides the ranges."""
    keys: dict[str, Any] = {VERSION_KEY: VERSION, "mbq.act.estimator": estimator}
    keys["mbq.act.sink.rule"] = f"|x| > {BEYOND:g} x the {100 * QUANTILE:g}th percentile of its class"
    return keys | {"mbq.act.sink.positions": list(sinks.positions), "mbq.act.sink.tokens": list(sinks.tokens)}


@torch.no_grad()
def count_magnitudes(layer: Layer, streams: Sequence[Streamed], sinks: Sinks) -> dict[tuple[str, str], Magnitudes]:
    """Run ``streams`` through ``layer``, in place, and count the magnitudes of the inputs of each of :data:`SITES`, by (site, class),
    without sinks. Sites that the layer does not have count nothing.
    """
    counted = {(site, kind): Magnitudes() for site in SITES for kind in CLASSES}
    for batch in batches(streams, layer):
        with Watch(layer) as watch:
            parts = pass_batch(layer, batch)
        vision, left = (torch.cat(masks).to(layer.device) for masks in ([s.vision for s in batch], [sinks.of(s) for s in batch]))
        for site in (site for site in layer.sites if site.name in SITES):
            x = watch.inputs[site.name][0]
            counted[site.name, "text"].add(x[~vision & ~left])
            counted[site.name, "vision"].add(x[vision & ~left])
        split_back(batch, parts)
    return counted
