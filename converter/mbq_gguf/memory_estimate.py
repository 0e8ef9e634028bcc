"""Estimates the peak memory of a conversion, and suggests options that need less if it does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mbq_gguf.calibration.batches import TOKENS, TOKENS_ON_CARD
from mbq_gguf.calibration.narrow import NARROW, SHARE
from mbq_gguf.cost import Site, Work
from mbq_gguf.settings import QuantiseSettings

# In bytes. A whole 7B took 6.0 GiB of host and 20.8 GiB of GPU memory, two layers of a 72B 1.3 and 45.3 GiB (docs/results.md). On machine B
# the reference VLM took 2.35, 2.56 and 3.65 GB with 32, 96 and 256 samples. Those runs held all of its 0.29 GB of weights at once; a
# conversion holds those of a layer, and what is outside of layers.
PROCESS = 1.1e9  # Python, torch, transformers and their buffers
DRIVER = 1.9e9  # host memory of the GPU driver
SQUARED = 34.0  # per pair of channels of a site: Hessian, cross moments, float64 factors and refits
CODED = 64.0  # per weight of a site: codes, scales, changes and buffers of the range search
STORED = 2.0  # per weight of a layer, as the checkpoint has it, while it becomes float32
ROUNDED = 1.2  # per weight of a layer: codes and scales of its rounded matrices
LEARNED = 9.6  # per weight of a layer while scales are learned, besides: values, stacks of them, gradients (9.4 for 48 experts)
COPIED = 4.0  # per weight of a layer: the copy that the search for channel factors rounds
DEFAULTS = QuantiseSettings()


class Memory(NamedTuple):
    """Bytes of host memory, of GPU memory (0 without a GPU), and of files on disk for activations that exceed the host's share
    (calibration/spill.py)."""

    host: float
    card: float
    disk: float = 0.0

    def fits(self, free: Memory) -> bool:
        """Whether this much memory is ``free``; the disk is not considered."""
        return self.host <= free.host and self.card <= free.card


ENDLESS = Memory(float("inf"), float("inf"))


def estimate_memory(
    work: Work, device: str, free: Memory = ENDLESS, share: float = float("inf"), settings: QuantiseSettings = DEFAULTS
) -> Memory:
    """The memory that ``work`` needs, given what is ``free``; host memory beyond ``share`` bytes is spilled to disk."""
    ends = 4.0 * (work.ends + work.tower)
    layer = max((sum(site.columns * site.rows for site in sites) for sites in work.layers), default=0)
    rounding = 4.0 * layer + (rounding_bytes(work.layers, settings) if work.tokens else STORED * layer)
    a_token = max((2 * sum(_compared(sites)) + 4 * sum(_shared(sites)) for sites in work.layers), default=0) + 12 * work.width
    activations = float(work.tokens * a_token)
    if device != "cpu":
        kept = min(activations, max(0.0, free.card - rounding))  # on the GPU, from which embeddings and head are released meanwhile
        held = min(activations - kept, max(0.0, share - PROCESS - DRIVER))
        one_end = 4.0 * work.vocabulary * work.width  # while it is read, or packed for the file
        card = max(ends + _writing(work, 16, free.card - ends), rounding + kept)
        return Memory(PROCESS + DRIVER + _page_locked(layer) + max(held, one_end), card, activations - kept - held)
    activations += work.tokens * max((2 * sum(_compared(sites)) + 4 * work.width for sites in work.layers), default=0)
    ahead = 4.0 * layer if work.tokens else 0.0  # the original model's next layer; the activations above are its too (walk/ahead.py)
    held = min(activations, max(0.0, share - PROCESS - ends))
    return Memory(PROCESS + ends + max(_writing(work, 32, free.host - ends), held + ahead + rounding), 0.0, activations - held)


def suggest_options(work: Work, device: str, free: Memory, share: float, settings: QuantiseSettings = DEFAULTS) -> str | None:
    """The options that lose the least with which ``work`` would fit; "" if it already fits, None if nothing helps."""
    for less, options in (
        (work, []),
        (replace(work, texts=0), ["--synthetic 0"]),
        (replace(work, texts=0, tokens=0), ["--rounding nearest"]),
    ):
        for where in dict.fromkeys((device, "cpu")):
            if estimate_memory(less, where, free, share, settings).fits(free):
                return " ".join(([] if where == device else ["--device cpu"]) + options)
    return None


def rounding_bytes(layers: Sequence[Sequence[Site]], settings: QuantiseSettings = DEFAULTS) -> float:
    """Bytes on the device that a layer takes in addition to its float32 weights: the most that any step takes, from reading the next layer
    in its place to learning scales."""
    return max((_layer_bytes(sites, settings) for sites in layers if sites), default=0.0)


def _layer_bytes(sites: Sequence[Site], settings: QuantiseSettings) -> float:
    """:func:`rounding_bytes` for one layer. Hessians of the original's inputs are kept from the original's pass to the layer's end."""
    weights = sum(site.columns * site.rows for site in sites)
    steps = [STORED * weights, ROUNDED * weights + max(map(_site_bytes, sites))]
    if settings.learn_scales:
        steps.append((ROUNDED + LEARNED) * weights)
    if not settings.sums_originals:
        return max(steps)
    copied = COPIED * weights if settings.method in ("awq", "mbq") and settings.follows_prefix else 0.0
    return max(*steps, copied, sum(map(_inputs, sites))) + 4.0 * sum(site.columns**2 for site in sites)


def _site_bytes(site: Site) -> float:
    """Bytes that rounding ``site`` takes. Experts of a stage are summed together, so the Hessians of all are there, and before that also
    their inputs of one batch."""
    rounding = max(SQUARED * site.columns**2, CODED * site.columns * site.rows)
    if site.experts == 1:
        return rounding
    return 4.0 * site.experts * site.columns * site.columns + max(rounding, site.experts * _inputs(site))


def _inputs(site: Site) -> float:
    """Bytes of the inputs of ``site`` in one batch."""
    return 4.0 * site.columns * max(site.share * TOKENS_ON_CARD, min(site.least, TOKENS))


def _page_locked(layer: int) -> float:
    """Bytes of host memory from which a GPU copies layers of that many weights, one after the other. PyTorch rounds them up to a power of
    two (models/read_ahead.py)."""
    return 2.0 ** math.ceil(math.log2(STORED * layer)) if layer else 0.0


def _writing(work: Work, bits: int, room: float) -> float:
    """Bytes of the decoder while the model generates texts: in the most bits that fit (calibration/narrow.py), or else the room that
    the fewest bits would need."""
    sizes = [work.weights * each / 8 for each in (bits, *NARROW)] if work.texts else [0.0]
    return next((size for size in sizes if size <= SHARE * room), sizes[-1] / SHARE)


def _compared(sites: Sequence[Site]) -> list[int]:
    """Channels per token and site that are kept of the original layer; none of experts."""
    return [site.compared for site in sites if site.experts == 1]


def _shared(sites: Sequence[Site]) -> list[int]:
    """Channels per token of the inputs that are kept of the quantised layer: those of every other site, the last of each branch."""
    return [site.columns for site in sites[1::2] if site.experts == 1]
