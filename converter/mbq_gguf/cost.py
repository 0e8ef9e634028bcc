"""What a conversion takes, from a model's shapes: seconds of each stage by a few measured rates, memory by what lies there at once.

:data:`CPU` and :data:`CARD` are all that was measured, and say where and when. Seconds of a CPU go with two rates that the machine has
now (:class:`Speed`), since a core that multiplies four times as fast does small operations only about twice as fast; a card waits for
launches and copies more than for products, so its seconds are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from mbq_gguf.calibration.narrow import NARROW, SHARE
from mbq_gguf.models.file_rows import TABLE
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel

TEXT_TOKENS = 128
STEPS = TEXT_TOKENS - 1


@dataclass(frozen=True)
class Rates:
    """Seconds for one of each."""

    start: float  # checks, imports, opening the model
    read: float  # a byte of the checkpoint, looked through once and read once more for its layer
    stream: float  # a sample, text or picture on its way to the first layer
    seen: float  # a weight of the vision tower times a picture token of such a stream
    step: float  # a token of all texts at once, whatever the layers
    layer_step: float  # the same, a layer
    written: float  # a weight of a layer or the head times a token of all texts
    scored: float  # an entry of the vocabulary times a token of all texts
    moved: float  # a token times a channel of a site: observed, kept, fetched again
    multiplied: float  # a token times a weight: runs through the layers
    squared: float  # a token times two channels: second moments
    column: float  # a column of a site: rounding goes column by column
    rounded: float  # a weight: ranges, codes, refits
    product: float  # a weight times a column of its site: errors carried on, codes improved
    packed: float  # a weight of embeddings and head, packed on the host
    stored: float  # a byte of the two files
    nearest: float  # a weight that is rounded to the nearest, where nothing else is done: the disk keeps up


@dataclass(frozen=True)
class Speed:
    """What a CPU does a second, with the load that it has: floating-point operations of matrix products by all ``threads``, and small
    operations, as rounding has them, by one."""

    products: float
    small: float
    threads: int


# Of these, seconds of PRODUCTS go with the products, and those of BESIDE, which two threads share (walk/ahead.py, calibration/generate.py),
# and all others with the small operations. One thread of machine A at CPU_SPEED, processor time of the reference VLM's layers and texts,
# 2026-11-29. Products, and how widths matter, are machine B's (2 cores of an AMD EPYC, AVX2), one thread, layers of 576 and of 1024
# channels, 2026-11-28: 48e9 operations a second.
PRODUCTS = ("seen", "written", "multiplied", "squared")
BESIDE = ("step", "layer_step", "scored", "moved", "column", "rounded", "product")
CPU_SPEED = Speed(183e9, 78e3, 1)
CPU = Rates(
    start=8.0,
    read=3.5e-10,
    stream=0.028,
    seen=1.44e-11,
    step=0.005,
    layer_step=1.8e-3,
    written=1.75e-11,
    scored=1.6e-8,
    moved=2.8e-8,
    multiplied=2.18e-11,
    squared=9.9e-12,
    column=0.0,
    rounded=4e-7,
    product=6e-11,
    packed=7e-9,
    stored=1e-9,
    nearest=2.1e-8,
)
# Of CPU, where rounding's small operations are compiled (rounding/kernels): 0.72 core seconds of a layer of the reference VLM, 0.29 of them
# products, on machine A beside other work, 2026-11-29.
COMPILED = {"rounded": 1.2e-7, "product": 1.0e-10}
# One H200 alone, 16 threads, a 7B's shapes by the defaults and two layers of a 72B's, 2026-11-28; rounding since it is kernels, by the four
# matrices of a 7B's layer, 2026-11-29.
CARD = Rates(
    start=14.0,
    read=5e-10,
    stream=0.05,
    seen=0.0,
    step=0.07,
    layer_step=4e-4,
    written=0.0,
    scored=0.0,
    moved=2e-10,
    multiplied=2e-14,
    squared=1.03e-14,
    column=4e-6,
    rounded=1.8e-9,
    product=6.1e-13,
    packed=2e-9,
    stored=1.0e-9,
    nearest=6e-8,
)
HALF = 0.65  # of the products of a symmetric sum are computed (calibration/sums.py)
SEARCHED = 3.4  # times a layer's seconds where channel factors are searched (MBQ, AWQ): 1483 s for 435 on the reference VLM
LEARNED = 1.4  # a pass of --learn-scales: 2855 s for 435 with four passes


@dataclass(frozen=True)
class Site:
    """A site of a layer: the columns and rows of the matrices that read it, and the share of the tokens that pass them (experts)."""

    columns: int
    rows: int
    share: float = 1.0

    @property
    def compared(self) -> int:
        """Channels that are held against the original's: inputs, or outputs where these are fewer (calibration/moments.py)."""
        return min(self.columns, self.rows)


@dataclass(frozen=True)
class Work:
    """What there is to do: ``layers`` by sites, other weights of the model, and tokens by kind."""

    layers: Sequence[Sequence[Site]]
    ends: int  # weights of embeddings and head
    tower: int
    vocabulary: int
    width: int
    checkpoint: int  # bytes
    files: int  # bytes of what is written
    streams: int  # samples, texts and pictures
    tokens: int  # of all of them
    texts: int
    table: int = 0  # weights of an embedding that stays in its file

    @property
    def weights(self) -> int:
        """Of all layers."""
        return sum(site.columns * site.rows for layer in self.layers for site in layer)


def work_of(model: LoadedModel, *, checkpoint: int, files: int, samples: int, sample_tokens: float, texts: int) -> Work:
    """The work on ``model``, of which an outline will do; half as many pictures as ``texts`` have as many tokens as a sample has."""
    decoder = model.decoder
    layers = sites_of(model)
    ends = decoder.embed_tokens.weight.numel() + (0 if model.tied else decoder.head.weight.numel())
    table = sum(parameter.numel() for parameter in getattr(decoder.module, TABLE, nn.Module()).parameters())
    whole = sum(parameter.numel() for parameter in model.model.parameters())
    layer_weights = sum(parameter.numel() for parameter in decoder.layers.parameters())
    pictures = texts // 2
    return Work(
        layers=layers,
        ends=ends,
        table=table,
        tower=whole - layer_weights - ends - table,
        vocabulary=decoder.head.out_features,
        width=decoder.embed_tokens.embedding_dim,
        checkpoint=checkpoint,
        files=files,
        streams=samples + texts + pictures,
        tokens=round((samples + pictures) * sample_tokens) + TEXT_TOKENS * texts,
        texts=texts,
    )


def sites_of(model: LoadedModel) -> list[list[Site]]:
    """The sites of each decoder layer."""
    layers = []
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    for module in model.decoder.layers:
        layout = model.decoder.layout.of(module)
        linears = {name: Layer(module, 0, layout).holder(name) for name in layout.readers}
        sites = []
        for site in layout.sites:
            readers = {id(linears[name]): linears[name] for name in site.readers}.values()  # rows of one fused linear count once
            share = 1.0 if site.expert is None else chosen / sum(other.stage == site.stage for other in layout.sites)
            sites.append(Site(max(each.in_features for each in readers), sum(each.out_features for each in readers), share))
        layers.append(sites)
    return layers


def layer_seconds(work: Work, sites: Sequence[Site], rates: Rates) -> float:
    """Of one decoder layer."""
    weights = sum(site.columns * site.rows for site in sites)
    total = 0.0
    for site in sites:
        tokens = work.tokens * site.share
        squares = HALF * site.columns + site.compared
        total += tokens * site.columns * (site.rows * rates.multiplied + rates.moved + squares * rates.squared)
        total += site.columns * rates.column + site.columns**2 * site.rows * rates.product
    return total + weights * rates.rounded


def rates_at(speed: Speed, compiled: bool = False) -> Rates:
    """:data:`CPU` on a machine of another ``speed``, with rounding's small operations ``compiled`` or not."""
    small = CPU_SPEED.small / speed.small
    factors = dict.fromkeys(PRODUCTS, CPU_SPEED.products / speed.products) | dict.fromkeys(BESIDE, small / min(speed.threads, 2))
    return Rates(**{name: seconds * factors.get(name, small) for name, seconds in (asdict(CPU) | (COMPILED if compiled else {})).items()})


def stage_seconds(work: Work, rates: Rates, searched: bool = False, learned: int = 0) -> dict[str, float]:
    """Seconds by stage, as a conversion tells them."""
    times = (SEARCHED if searched else 1.0) + LEARNED * learned
    texts = STEPS * (rates.step + rates.layer_step * len(work.layers))
    texts += STEPS * work.texts * ((work.weights + work.vocabulary * work.width) * rates.written + work.vocabulary * rates.scored)
    return {
        "load": rates.start + work.checkpoint * rates.read,
        "capture": work.streams * rates.stream + work.tokens * work.tower * rates.seen,
        "texts": texts if work.texts else 0.0,
        "layers": times * sum(layer_seconds(work, sites, rates) for sites in work.layers) if work.tokens else 0.0,
        "write": (work.ends + work.table) * rates.packed + work.files * rates.stored,
    }


# Memory, in bytes. A whole 7B held 5.9 GiB of the host and 23.3 of the card, two layers of a 72B 5.2 and 58.6
# (docs/results.md). On machine B the reference VLM held 2.35, 2.56 and 3.65 GB with 32, 96 and
# 256 samples, its 0.29 GB of weights among them, which are no longer held whole.
PROCESS = 1.1e9  # Python, torch, transformers and their buffers
DRIVER = 1.9e9  # of a card's driver on the host
SQUARED = 34.0  # for each two channels of a site: Hessian, cross moments, factors in float64 and what refits take
CODED = 64.0  # for each weight of a site: codes, scales, changes and what ranges are searched with


def memory(work: Work, device: str, room: float = float("inf")) -> tuple[float, float]:
    """What the host and the card (0 without one) hold at the most; ``room`` is what is free on the device."""
    ends = 4.0 * (work.ends + work.tower)
    layer = max((sum(site.columns * site.rows for site in sites) for sites in work.layers), default=0)
    rounding = 4.0 * layer + (to_round(work.layers) if work.tokens else 0.0)
    a_token = max((2 * sum(_compared(sites)) + 4 * sum(_shared(sites[1::2])) for sites in work.layers), default=0) + 12 * work.width
    activations = float(work.tokens * a_token)
    if device != "cpu":
        kept = min(activations, max(0.0, room - rounding))  # on the card (calibration/spill.py), where ends are away meanwhile
        one_end = 4.0 * work.vocabulary * work.width  # read, or packed for the file
        return PROCESS + DRIVER + max(activations - kept, one_end), max(ends + _writing(work, 16, room - ends), rounding + kept)
    inputs = work.tokens * max((2 * sum(_compared(sites)) + 4 * work.width for sites in work.layers), default=0)
    ahead = 4.0 * layer + inputs if work.tokens else 0.0  # of the original's next layer (walk/ahead.py)
    return PROCESS + ends + max(_writing(work, 32, room - ends), activations + ahead + rounding), 0.0


def to_round(layers: Sequence[Sequence[Site]]) -> float:
    """Bytes of the device that rounding takes beside the layer itself, at its largest site."""
    sites = [site for sites in layers for site in sites]
    return max((max(SQUARED * site.columns**2, CODED * site.columns * site.rows) for site in sites), default=0.0)


def _writing(work: Work, bits: int, room: float) -> float:
    """Bytes of the layers while the model writes texts: in the most bits that find room (calibration/narrow.py)."""
    sizes = [work.weights * each / 8 for each in (bits, *NARROW)] if work.texts else [0.0]
    return next((size for size in sizes if size <= SHARE * room), sizes[-1])


def _compared(sites: Sequence[Site]) -> list[float]:
    """Channels that a token leaves of the original layer."""
    return [site.compared * site.share for site in sites]


def _shared(sites: Sequence[Site]) -> list[float]:
    """Channels of the inputs that a token leaves of the rounded layer, which keeps those of every other site, each branch's last."""
    return [site.columns * site.share for site in sites]
