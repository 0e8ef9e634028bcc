"""The walk through the decoder: calibrate, equalise and round one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.observe import Observed, TokenWeights, observe
from mbq_gguf.calibration.sensitivity import measure
from mbq_gguf.calibration.stream import Streamed, advance, capture, logits, working_layer
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.formats.container import Bytes
from mbq_gguf.formats.registry import container
from mbq_gguf.models.decoder import GROUPS
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.rounding.layer import round_layer
from mbq_gguf.transforms.fold import spread
from mbq_gguf.transforms.layer import fold_layer, search_layer
from mbq_gguf.workdir import WorkDir

Method = Literal["rtn", "awq", "mbq"]
Rounding = Literal["nearest", "gptq"]
Progress = Callable[[str, int, int], None]  # stage, done, total
CHECK_SAMPLES = 2
# Relative change that folding may make, in float32; measured on the reference VLM: see below.
FOLD_BOUND = 1e-3


@dataclass(frozen=True)
class QuantiseSettings:
    """How to quantise. The defaults are the combination that scores best (docs/results.md)."""

    container: str = "MBQ3"
    method: Method = "mbq"
    rounding: Rounding = "gptq"
    floor: bool = True  # no layer's modality ratio below the median over layers
    search_samples: int = 32  # samples that the search for equalisation factors compares on
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean


@dataclass(frozen=True)
class Packed:
    """A quantised weight as the file stores it: ``data`` uint8 [rows, row_bytes] in ``container``, rows of ``columns`` weights."""

    container: str
    data: Bytes
    columns: int


@dataclass
class QuantiseResult:
    """Everything that export needs, by decoder-relative parameter names (``layers.0.self_attn.q_proj.weight``)."""

    packed: dict[str, Packed] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)  # other parameters that equalisation changed, float32
    ratios: dict[str, list[float]] = field(default_factory=dict)  # "attention" and "mlp", one a layer
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)  # by layer name, then group
    fallbacks: list[tuple[str, str]] = field(default_factory=list)  # parameter name and the container it fell back to
    seconds: dict[str, float] = field(default_factory=dict)  # by stage


def quantise(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    settings: QuantiseSettings,
    work: WorkDir | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> QuantiseResult:
    """Quantise every decoder linear of ``loaded``, which is left as it is.

    ``work`` takes each finished layer and gives back those of an earlier run; the bytes are the same either way. ``progress`` is called
    with stage, done and total. Raises UsageError for an unknown container or a missing calibration set, UserError where folding the
    factors changes the model's function.
    """
    container(settings.container)
    if not samples and (settings.method != "rtn" or settings.rounding != "nearest"):
        raise UsageError(f"Method {settings.method} with {settings.rounding} rounding needs calibration samples.")
    walk = _Walk(loaded, settings, work, progress)
    walk.calibrate(samples)
    for index in range(len(loaded.decoder.layers)):
        walk.layer(index)
        progress("layers", index + 1, len(loaded.decoder.layers))
    walk.check_logits()
    return walk.result


@dataclass
class _LayerWork:
    """What is kept of a finished layer: names are relative to the layer."""

    packed: dict[str, Packed]
    replaced: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor]
    exponents: dict[str, float]


class _Walk:
    """The state that moves from layer to layer."""

    def __init__(self, loaded: LoadedModel, settings: QuantiseSettings, work: WorkDir | None, progress: Progress) -> None:
        self.loaded, self.settings, self.work, self.progress = loaded, settings, work, progress
        self.result = QuantiseResult()
        self.streams: list[Streamed] = []  # original inputs of the next layer
        self.checked: list[Streamed] = []  # the first few again, through the folded layers

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Capture the samples, and measure the ratios where the method weighs modalities."""
        with self._timed("capture"):
            for number, stream in enumerate(capture(self.loaded, samples)):
                self.streams.append(stream)
                self.progress("capture", number + 1, len(samples))
        if self.settings.method != "rtn":
            self.checked = [replace(stream) for stream in self.streams[:CHECK_SAMPLES]]
        if self.settings.method == "mbq":
            self.result.ratios = self._ratios()

    def _ratios(self) -> dict[str, list[float]]:
        saved = self.work.load("sensitivity") if self.work else None
        if saved is not None:
            return dict(saved[1])
        with self._timed("sensitivity"):
            found = measure(self.loaded, self.streams, lambda done, total: self.progress("sensitivity", done, total))
        ratios = found.ratios(self.settings.floor)
        if self.work:
            self.work.save("sensitivity", {}, ratios)
        return ratios

    def layer(self, index: int) -> None:
        """Quantise layer ``index``, or take it from the work directory, and move the streams past it."""
        layer = working_layer(self.loaded, index)
        name = f"layer-{index:04d}"
        done = _restore(self.work.load(name)) if self.work else None
        if done is None:
            done = self._quantise_layer(layer, index)
            if self.work:
                self.work.save(name, *_saved(done))
        else:
            advance(layer, index, self.streams, self.loaded.device)
            fold_layer(layer, done.factors)
            self._check_fold(layer, index)
        self._collect(f"layers.{index}", done)

    def _quantise_layer(self, layer: torch.nn.Module, index: int) -> _LayerWork:
        settings = self.settings
        call_weights: TokenWeights | None = {"rtn": None, "awq": uniform, "mbq": modality(self.result.ratios, index)}[settings.method]
        with self._timed("observe"):
            observed = observe(
                layer,
                index,
                self.streams,
                hessian_weights=uniform if settings.rounding == "gptq" else None,
                call_weights=call_weights,
                call_samples=settings.search_samples,
            )
        done = _LayerWork({}, {}, {}, {})
        if settings.method != "rtn":
            with self._timed("search"):
                choices = search_layer(layer, observed, settings.container, power=1 if settings.method == "mbq" else 2)
            done.factors = {name: choice.factors for name, choice in choices.items()}
            done.exponents = {name: choice.exponent for name, choice in choices.items()}
            done.replaced = fold_layer(layer, done.factors)
            self._check_fold(layer, index)
        with self._timed("rounding"):
            rounded = round_layer(layer, settings.container, self._hessians(layer, observed, done.factors), settings.damping)
        for name, (kind, weight) in rounded.items():
            done.packed[f"{name}.weight"] = Packed(kind, weight.data, weight.weight.shape[1])
        return done

    def _hessians(self, layer: torch.nn.Module, observed: Observed, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Second moments of the inputs that the folded layer's linears take, x / s; None for nearest rounding."""
        if self.settings.rounding == "nearest":
            return None
        out = {}
        for group in GROUPS:
            hessian = observed.statistics[group.name].hessian
            assert hessian is not None
            if group.name in factors:
                inverse = 1.0 / spread(layer, group, factors[group.name])
                hessian = hessian * inverse * inverse[:, None]
            out[group.name] = hessian
        return out

    def _check_fold(self, layer: torch.nn.Module, index: int) -> None:
        """Send the check samples through the folded layer, and compare with the streams, which have passed the original one."""
        advance(layer, index, self.checked, self.loaded.device)
        for folded, original in zip(self.checked, self.streams, strict=False):
            change = float((folded.hidden - original.hidden).norm() / original.hidden.norm())
            if not change <= FOLD_BOUND:
                raise UserError(
                    f"Equalisation changes the output of decoder layer {index} by {change:.1e} of its norm: "
                    f"this model's layers are not the standard kind, so use --method rtn."
                )

    def check_logits(self) -> None:
        """Compare the logits of the folded and the original model on the check samples."""
        for folded, original in zip(self.checked, self.streams, strict=False):
            with torch.no_grad():
                expected = logits(self.loaded, original.hidden)
                change = float((logits(self.loaded, folded.hidden) - expected).abs().max() / expected.abs().max())
            if not change <= FOLD_BOUND:
                raise UserError(f"Equalisation changes the model's logits by {change:.1e} of their maximum; use --method rtn.")

    def _collect(self, prefix: str, done: _LayerWork) -> None:
        result = self.result
        for name, packed in done.packed.items():
            result.packed[f"{prefix}.{name}"] = packed
            if packed.container != self.settings.container:
                result.fallbacks.append((f"{prefix}.{name}", packed.container))
        result.replaced.update({f"{prefix}.{name}": value.cpu() for name, value in done.replaced.items()})
        if done.exponents:
            result.exponents[prefix] = done.exponents

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.result.seconds[stage] = self.result.seconds.get(stage, 0.0) + time.perf_counter() - start


def _saved(done: _LayerWork) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A finished layer as tensors and JSON data; the inverse of :func:`_restore`."""
    tensors = {f"packed.{name}": torch.from_numpy(packed.data) for name, packed in done.packed.items()}
    tensors |= {f"replaced.{name}": value.cpu() for name, value in done.replaced.items()}
    tensors |= {f"factors.{name}": value.cpu() for name, value in done.factors.items()}
    kinds = {name: [packed.container, packed.columns] for name, packed in done.packed.items()}
    return tensors, {"packed": kinds, "exponents": done.exponents}


def _restore(saved: tuple[dict[str, torch.Tensor], Any] | None) -> _LayerWork | None:
    if saved is None:
        return None
    tensors, data = saved
    packed = {name: Packed(kind, tensors[f"packed.{name}"].numpy(), columns) for name, (kind, columns) in data["packed"].items()}
    parts = {part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)} for part in ("replaced.", "factors.")}
    return _LayerWork(packed, parts["replaced."], parts["factors."], data["exponents"])
