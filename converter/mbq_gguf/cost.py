"""The work of a conversion, from a model's shapes, and an estimate of the seconds of each stage from a few measured rates.

:data:`CPU` and :data:`CARD` hold the measured rates, with place and date. CPU times are scaled by two speeds of the current machine
(:class:`Speed`), because a core that multiplies matrices four times as fast does small operations only about twice as fast. GPU times are
not scaled: a GPU waits more for launches and copies than for products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from mbq_gguf.calibration.batches import batch_count
from mbq_gguf.calibration.experts import TOKENS
from mbq_gguf.models.file_rows import TABLE
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel

TEXT_TOKENS = 128
STEPS = TEXT_TOKENS - 1


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of each kind of work."""

    start: float  # checks, imports, opening the model
    read: float  # a byte of the checkpoint, which is read twice: checked for NaN, and for its layer
    stream: float  # a sample, text or picture up to the first layer
    seen: float  # a weight of the vision tower times a picture token
    step: float  # generating one token of all texts together, apart from the layers
    layer_step: float  # the same, per layer
    written: float  # a weight of a layer or the head times a generated token
    scored: float  # an entry of the vocabulary times a generated token
    moved: float  # a token times a channel of a site: observed, kept and read back
    multiplied: float  # a token times a weight: forward passes
    squared: float  # a token times two channels: second moments
    called: float  # a site of an expert in a batch of tokens: all passes and sums of a layer
    column: float  # a column of a site: GPTQ's loop over columns
    rounded: float  # a weight: range search, codes, refits
    product: float  # a weight times a column of its site: error propagation and coordinate descent
    packed: float  # a weight of embeddings and head: packing on the host
    stored: float  # a byte of the output files
    nearest: float  # a weight that is only rounded to nearest, if the disk keeps up


@dataclass(frozen=True)
class Speed:
    """A CPU's speed under its current load, per second: floating-point operations of matrix products with all ``threads``, and small
    operations, like those of rounding, with one thread."""

    products: float
    small: float
    threads: int


# PRODUCTS scale with the speed of products; BESIDE, which two threads share (walk/ahead.py, calibration/generate.py), and all others with
# that of small operations. Measured with one thread of machine A at CPU_SPEED, processor time of the reference VLM's layers and texts,
# 2026-11-29. Products, and the influence of widths, were measured on machine B (2 cores of an AMD EPYC, AVX2), one thread, layers of 576
# and of 1024 channels, 2026-11-28: 48e9 operations per second. What an expert costs besides is what a layer of 128 of 64 x 64 took more
# than the other rates say: 3.9 s instead of 0.9, one thread of machine A, 2026-11-30.
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
    called=1.3e-3,
    column=0.0,
    rounded=4e-7,
    product=6e-11,
    packed=7e-9,
    stored=1e-9,
    nearest=2.1e-8,
)
# Replaces rates of CPU if rounding's C kernels are available (rounding/kernels): 0.72 core seconds for a layer of the reference VLM,
# of which 0.29 for products, on machine A while it did other work, 2026-11-29.
COMPILED = {"rounded": 1.2e-7, "product": 1.0e-10}
# One H200, a 7B's shapes with default options, 2026-11-29 (docs/log.md): rounding by each of a layer's four sites, passes by what the layer
# takes besides, texts and writing by runs of 8 and of 28 layers; experts by layers of 128 of them, 2026-11-30. Compiling Triton's kernels,
# some 12 s once for a user, is left out.
CARD = Rates(
    start=13.0,
    read=3e-10,
    stream=0.047,
    seen=0.0,
    step=0.03,
    layer_step=3.1e-3,
    written=0.0,
    scored=0.0,
    moved=3e-11,
    multiplied=1.4e-14,
    squared=8e-15,
    called=1.1e-3,
    column=3.4e-6,
    rounded=5.6e-10,
    product=5.6e-13,
    packed=2e-9,
    stored=2.4e-9,
    nearest=6e-8,
)
# The share of a stage's time that several GPUs divide: two took 0.82 s for a layer and 7 s for capture, one 1.49 and 10 (docs/cards.md).
DIVIDED = {"capture": 0.6, "layers": 0.9}
HALF = 0.65  # share of the products of a symmetric sum that is computed (calibration/sums.py)
SEARCHED = 3.4  # factor of a layer's time with the search for channel factors (MBQ, AWQ): 1483 s instead of 435 for the reference VLM
LEARNED = 1.4  # per pass of --learn-scales: 2855 s instead of 435 with four passes


@dataclass(frozen=True)
class Site:
    """A site of a layer: columns and rows of the matrices that read it, and the share of tokens that pass through them. An expert's is one
    of ``experts``, and sees ``least`` tokens while it is rounded, if there are as many (calibration/experts.py)."""

    columns: int
    rows: int
    share: float = 1.0
    experts: int = 1
    least: int = 0

    def seen(self, tokens: int) -> float:
        """The number of ``tokens`` that are seen while it is rounded."""
        return max(tokens * self.share, min(tokens, self.least))

    @property
    def compared(self) -> int:
        """Channels that are compared with the original's: inputs, or outputs if these are fewer (calibration/moments.py)."""
        return min(self.columns, self.rows)


@dataclass(frozen=True)
class Work:
    """The amount of work: ``layers`` as lists of sites, other weights of the model, and tokens by kind."""

    layers: Sequence[Sequence[Site]]
    ends: int  # weights of embeddings and head
    tower: int
    vocabulary: int
    width: int
    checkpoint: int  # bytes
    files: int  # bytes of the output files
    streams: int  # samples, texts and pictures
    tokens: int  # of all streams
    texts: int
    table: int = 0  # weights of an embedding table that stays in its file
    batches: int = 1  # in which all tokens pass a layer

    @property
    def weights(self) -> int:
        """The number of weights of all layers."""
        return sum(site.columns * site.rows for layer in self.layers for site in layer)


def work_of(
    model: LoadedModel, *, checkpoint: int, files: int, samples: int, sample_tokens: float, texts: int, on_card: bool = False
) -> Work:
    """The work on ``model``, which may be without weights. Half as many pictures as ``texts`` are added, each as long as a sample."""
    decoder = model.decoder
    layers = sites_of(model)
    ends = decoder.embed_tokens.weight.numel() + (0 if model.tied else decoder.head.weight.numel())
    table = sum(parameter.numel() for parameter in getattr(decoder.module, TABLE, nn.Module()).parameters())
    whole = sum(parameter.numel() for parameter in model.model.parameters())
    layer_weights = sum(parameter.numel() for parameter in decoder.layers.parameters())
    pictures = texts // 2
    tokens = round((samples + pictures) * sample_tokens) + TEXT_TOKENS * texts
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
        tokens=tokens,
        texts=texts,
        batches=batch_count(tokens, on_card),
    )


def sites_of(model: LoadedModel) -> list[list[Site]]:
    """The sites of every decoder layer."""
    layers = []
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 1
    least = TOKENS * model.decoder.embed_tokens.embedding_dim
    for module in model.decoder.layers:
        layout = model.decoder.layout.of(module)
        linears = {name: Layer(module, 0, layout).holder(name) for name in layout.readers}
        sites = []
        for site in layout.sites:
            readers = {id(linears[name]): linears[name] for name in site.readers}.values()  # count a fused linear once
            columns, rows = max(each.in_features for each in readers), sum(each.out_features for each in readers)
            experts = sum(other.stage == site.stage for other in layout.sites) if site.expert is not None else 1
            sites.append(Site(columns, rows) if experts == 1 else Site(columns, rows, chosen / experts, experts, least))
        layers.append(sites)
    return layers


def layer_seconds(work: Work, sites: Sequence[Site], rates: Rates) -> float:
    """The seconds for one decoder layer."""
    weights = sum(site.columns * site.rows for site in sites)
    total = 0.0
    for site in sites:
        tokens = site.seen(work.tokens)
        squares = HALF * site.columns + site.compared
        total += tokens * site.columns * (site.rows * rates.multiplied + rates.moved + squares * rates.squared)
        total += site.columns * rates.column + site.columns**2 * site.rows * rates.product
    return total + weights * rates.rounded + call_seconds(work, sites, rates)


def call_seconds(work: Work, sites: Sequence[Site], rates: Rates) -> float:
    """What a layer's experts cost besides their products. Several GPUs do not divide it."""
    return work.batches * rates.called * sum(site.experts > 1 for site in sites)


def rates_at(speed: Speed, compiled: bool = False) -> Rates:
    """:data:`CPU` on a machine of another ``speed``, with rounding's small operations ``compiled`` or not."""
    small = CPU_SPEED.small / speed.small
    factors = dict.fromkeys(PRODUCTS, CPU_SPEED.products / speed.products) | dict.fromkeys(BESIDE, small / min(speed.threads, 2))
    return Rates(**{name: seconds * factors.get(name, small) for name, seconds in (asdict(CPU) | (COMPILED if compiled else {})).items()})


def stage_seconds(work: Work, rates: Rates, searched: bool = False, learned: int = 0, processes: int = 1) -> dict[str, float]:
    """Seconds by stage, with a conversion's names of stages, for one or several ``processes`` with a GPU each."""
    times = (SEARCHED if searched else 1.0) + LEARNED * learned
    texts = STEPS * (rates.step + rates.layer_step * len(work.layers))
    texts += STEPS * work.texts * ((work.weights + work.vocabulary * work.width) * rates.written + work.vocabulary * rates.scored)
    alone = {
        "load": rates.start + work.checkpoint * rates.read,
        "capture": work.streams * rates.stream + work.tokens * work.tower * rates.seen,
        "texts": texts if work.texts else 0.0,
        "layers": times * sum(layer_seconds(work, sites, rates) for sites in work.layers) if work.tokens else 0.0,
        "write": (work.ends + work.table) * rates.packed + work.files * rates.stored,
    }
    calls = {"layers": times * sum(call_seconds(work, sites, rates) for sites in work.layers)}
    saved = {stage: share * (1 - 1 / processes) * (alone[stage] - calls.get(stage, 0.0)) for stage, share in DIVIDED.items()}
    return {stage: seconds - saved.get(stage, 0.0) for stage, seconds in alone.items()}
