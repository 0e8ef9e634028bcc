"""What a conversion holds of memory at the most, by what lies there at once, and which options hold less where that is too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mbq_gguf.calibration.narrow import NARROW, SHARE
from mbq_gguf.cost import Site, Work

# In bytes. A whole 7B held 5.9 GiB of the host and 23.3 of the card, two layers of a 72B 5.2 and 58.6
# (docs/results.md). On machine B the reference VLM held 2.35, 2.56 and 3.65 GB with 32, 96 and
# 256 samples, its 0.29 GB of weights among them, which are no longer held whole.
PROCESS = 1.1e9  # Python, torch, transformers and their buffers
DRIVER = 1.9e9  # of a card's driver on the host
SQUARED = 34.0  # for each two channels of a site: Hessian, cross moments, factors in float64 and what refits take
CODED = 64.0  # for each weight of a site: codes, scales, changes and what ranges are searched with


class Memory(NamedTuple):
    """Bytes: of the host, of a card (0 without one), and of files on disk, where activations wait when the host's share has ended
    (calibration/spill.py)."""

    host: float
    card: float
    disk: float = 0.0

    def fits(self, free: Memory) -> bool:
        """Whether there is so much memory ``free``; of the disk nothing is said."""
        return self.host <= free.host and self.card <= free.card


ENDLESS = Memory(float("inf"), float("inf"))


def memory(work: Work, device: str, free: Memory = ENDLESS, share: float = float("inf")) -> Memory:
    """What ``work`` takes where so much is ``free``; beyond ``share`` of the host's, activations go to disk."""
    ends = 4.0 * (work.ends + work.tower)
    layer = max((sum(site.columns * site.rows for site in sites) for sites in work.layers), default=0)
    rounding = 4.0 * layer + (to_round(work.layers) if work.tokens else 0.0)
    a_token = max((2 * sum(_compared(sites)) + 4 * sum(_shared(sites[1::2])) for sites in work.layers), default=0) + 12 * work.width
    activations = float(work.tokens * a_token)
    if device != "cpu":
        kept = min(activations, max(0.0, free.card - rounding))  # on the card, where ends are away meanwhile
        held = min(activations - kept, max(0.0, share - PROCESS - DRIVER))
        one_end = 4.0 * work.vocabulary * work.width  # read, or packed for the file
        card = max(ends + _writing(work, 16, free.card - ends), rounding + kept)
        return Memory(PROCESS + DRIVER + max(held, one_end), card, activations - kept - held)
    activations += work.tokens * max((2 * sum(_compared(sites)) + 4 * work.width for sites in work.layers), default=0)
    ahead = 4.0 * layer if work.tokens else 0.0  # the original's next layer, as those activations are (walk/ahead.py)
    held = min(activations, max(0.0, share - PROCESS - ends))
    return Memory(PROCESS + ends + max(_writing(work, 32, free.host - ends), held + ahead + rounding), 0.0, activations - held)


def way_out(work: Work, device: str, free: Memory, share: float) -> str | None:
    """The options with which ``work`` would find room, of those that lose the least; "" where it does already, None where none would."""
    for less, options in (
        (work, []),
        (replace(work, texts=0), ["--synthetic 0"]),
        (replace(work, texts=0, tokens=0), ["--rounding nearest"]),
    ):
        for where in dict.fromkeys((device, "cpu")):
            if memory(less, where, free, share).fits(free):
                return " ".join(([] if where == device else ["--device cpu"]) + options)
    return None


def to_round(layers: Sequence[Sequence[Site]]) -> float:
    """Bytes of the device that rounding takes beside the layer itself, at its largest site."""
    sites = [site for sites in layers for site in sites]
    return max((max(SQUARED * site.columns**2, CODED * site.columns * site.rows) for site in sites), default=0.0)


def _writing(work: Work, bits: int, room: float) -> float:
    """Bytes of the layers while the model writes texts: in the most bits that find room (calibration/narrow.py), or what the fewest
    would find it in."""
    sizes = [work.weights * each / 8 for each in (bits, *NARROW)] if work.texts else [0.0]
    return next((size for size in sizes if size <= SHARE * room), sizes[-1] / SHARE)


def _compared(sites: Sequence[Site]) -> list[float]:
    """Channels that a token leaves of the original layer."""
    return [site.compared * site.share for site in sites]


def _shared(sites: Sequence[Site]) -> list[float]:
    """Channels of the inputs that a token leaves of the rounded layer, which keeps those of every other site, each branch's last."""
    return [site.columns * site.share for site in sites]
