"""What a conversion does, from a model's shapes, and the seconds of each stage by a few measured rates.

:data:`CPU` and :data:`CARD` are all that was measured, and say where and when. Seconds of a CPU go with two rates that the machine has
now (:class:`Speed`), since a core that multiplies four times as fast does small operations only about twice as fast; a card waits for
launches and copies more than for products, so its seconds are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

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
