"""The walk through the decoder: calibrate, rotate, equalise and round one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import Moments, moments
from mbq_gguf.calibration.observe import Observed, TokenWeights, observe
from mbq_gguf.calibration.precision import bf16_products
from mbq_gguf.calibration.sensitivity import measure
from mbq_gguf.calibration.stream import Streamed, advance, capture, working_layer
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.registry import container
from mbq_gguf.models.decoder import GROUPS, Group, linear
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.outcome import LayerWork, Packed, QuantiseResult, restored_layer, saved_layer
from mbq_gguf.rounding.sequence import Refinement, round_in_order
from mbq_gguf.transforms.fold import spread
from mbq_gguf.transforms.layer import changed_parameters, fold_layer, search_layer
from mbq_gguf.transforms.preserved import FunctionCheck
from mbq_gguf.transforms.rotation import Rotate, Rotation, check_rotatable, draw, rotate_layer, rotated_ends, rotated_projector
from mbq_gguf.workdir import WorkDir

Method = Literal["rtn", "awq", "mbq"]
Rounding = Literal["nearest", "gptq"]
Progress = Callable[[str, int, int], None]  # stage, done, total
ROTATION_SEED = 0


@dataclass(frozen=True)
class QuantiseSettings:
    """How to quantise. The defaults are the combination that scores best (docs/results.md)."""

    container: str = "MBQ3"
    method: Method = "mbq"
    rounding: Rounding = "gptq"
    floor: bool = True  # no layer's modality ratio below the median over layers
    rotate: Rotate = "none"
    clip: bool = False  # search each block's range
    distort: bool = False  # Hessians from the inputs that the already rounded prefix gives
    correction: float = 0.0  # share of the prefix's output error that a layer makes good; needs distort
    refits: int = 0  # turns of refitting scales and minima to the codes
    search_samples: int = 32  # samples that the search for equalisation factors compares on
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean


def quantise(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    settings: QuantiseSettings,
    work: WorkDir | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> QuantiseResult:
    """Quantise every decoder linear of ``loaded``, which is left as it is.

    ``work`` takes each finished layer and gives back those of an earlier run; the bytes are the same either way. ``progress`` is called
    with stage, done and total. Raises UsageError for an unknown container or a missing calibration set, UserError where a transform
    changes the model's function.
    """
    container(settings.container)
    if not samples and (settings.method != "rtn" or settings.rounding != "nearest"):
        raise UsageError(f"Method {settings.method} with {settings.rounding} rounding needs calibration samples.")
    walk = _Walk(loaded, settings, work, progress)
    walk.calibrate(samples)
    for index in range(len(loaded.decoder.layers)):
        walk.layer(index)
        progress("layers", index + 1, len(loaded.decoder.layers))
    return walk.finish()


class _Walk:
    """The state that moves from layer to layer."""

    def __init__(self, loaded: LoadedModel, settings: QuantiseSettings, work: WorkDir | None, progress: Progress) -> None:
        self.loaded, self.settings, self.work, self.progress = loaded, settings, work, progress
        self.result = QuantiseResult()
        self.rotation: Rotation | None = None
        self.streams: list[Streamed] = []  # inputs of the next layer in the original model (in the rotated basis)
        self.prefix: list[Streamed] = []  # the same in the rounded model, where distort asks for them
        self.check: FunctionCheck | None = None

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Capture the samples, measure the ratios where the method weighs modalities, and rotate."""
        with self._timed("capture"):
            for number, stream in enumerate(capture(self.loaded, samples)):
                self.streams.append(stream)
                self.progress("capture", number + 1, len(samples))
        if self.settings.method == "mbq":
            self.result.ratios = self._ratios()
        if self.settings.rotate != "none":
            check_rotatable(self.loaded)
            self.rotation = draw(self.loaded.decoder, self.settings.rotate, ROTATION_SEED)
            self.result.hadamard = self.rotation.block
        if self.settings.method != "rtn" or self.rotation:
            self.check = FunctionCheck(self.loaded, self.streams, self.rotation)
        if self.rotation:
            for stream in self.streams:
                stream.hidden = (stream.hidden.double() @ self.rotation.residual).to(stream.hidden)
        if self.settings.distort:
            self.prefix = [replace(stream) for stream in self.streams]

    def _ratios(self) -> dict[str, list[float]]:
        saved = self.work.load("sensitivity") if self.work else None
        if saved is not None:
            return dict(saved[1])
        with self._timed("sensitivity"), bf16_products():
            found = measure(self.loaded, self.streams, lambda done, total: self.progress("sensitivity", done, total))
        ratios = found.ratios(self.settings.floor)
        if self.work:
            self.work.save("sensitivity", {}, ratios)
        return ratios

    def layer(self, index: int) -> None:
        """Quantise layer ``index``, or take it from the work directory, and move the streams past it."""
        layer = working_layer(self.loaded, index)
        if self.rotation:
            rotate_layer(layer, self.rotation, index)
        name = f"layer-{index:04d}"
        done = restored_layer(self.work.load(name)) if self.work else None
        if done is None:
            done = self._quantise_layer(layer, index)
            if self.work:
                self.work.save(name, *saved_layer(done))
        else:
            with self._timed("observe"), bf16_products():
                advance(layer, index, self.streams, self.loaded.device)
            fold_layer(layer, done.factors)
            self._check(layer, index)
            for key, packed in done.packed.items():
                weight = torch.from_numpy(container(packed.container).dequantize(packed.data))
                linear(layer, key.removesuffix(".weight")).weight.data.copy_(weight)
        with self._timed("moments"), bf16_products():
            advance(layer, index, self.prefix, self.loaded.device)
        self._collect(f"layers.{index}", done)

    def _quantise_layer(self, layer: nn.Module, index: int) -> LayerWork:
        settings = self.settings
        call_weights: TokenWeights | None = {"rtn": None, "awq": uniform, "mbq": modality(self.result.ratios, index)}[settings.method]
        with self._timed("observe"), bf16_products():
            observed = observe(
                layer,
                index,
                self.streams,
                hessian_weights=uniform if settings.rounding == "gptq" and not settings.distort else None,
                call_weights=call_weights,
                call_samples=settings.search_samples,
                keep_inputs=settings.correction > 0,
            )
        done = LayerWork({}, {}, {}, {})
        if settings.method != "rtn":
            with self._timed("search"), bf16_products():
                choices = search_layer(layer, observed, settings.container, 1 if settings.method == "mbq" else 2, self._foldable())
            done.factors = {name: choice.factors for name, choice in choices.items()}
            done.exponents = {name: choice.exponent for name, choice in choices.items()}
            fold_layer(layer, done.factors)
        done.replaced = changed_parameters(layer, working_layer(self.loaded, index))
        self._check(layer, index)

        def moments_of(group: Group) -> Moments | None:
            if settings.rounding == "nearest":
                return None
            if settings.distort:
                originals = _folded_inputs(layer, group, observed, done.factors) if settings.correction else None
                with self._timed("moments"), bf16_products():
                    return moments(layer, index, self.prefix, group, uniform, originals)
            return _folded_moments(layer, group, observed, done.factors)

        with self._timed("rounding"):
            refinement = Refinement(settings.damping, settings.clip, settings.correction, settings.refits)
            rounded = round_in_order(layer, settings.container, moments_of, refinement)
        for name, (kind, weight) in rounded.items():
            done.packed[f"{name}.weight"] = Packed(kind, weight.data, weight.weight.shape[1])
        return done

    def _foldable(self) -> tuple[Group, ...]:
        """Groups that take channel factors: not down_proj where a Hadamard transform lies between it and up_proj."""
        return tuple(group for group in GROUPS if not (group.name == "down" and self.result.hadamard))

    def _check(self, layer: nn.Module, index: int) -> None:
        if self.check:
            self.check.layer(layer, index)

    def finish(self) -> QuantiseResult:
        """Check the logits, and add what lies at the ends of the decoder."""
        ends = rotated_ends(self.loaded.decoder, self.rotation) if self.rotation else {}
        if self.check:
            self.check.logits(ends)
        self.result.replaced.update(ends)
        if self.rotation:
            self.result.projector = rotated_projector(self.loaded, self.rotation)
        return self.result

    def _collect(self, prefix: str, done: LayerWork) -> None:
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


def _inverse_factors(layer: nn.Module, group: Group, factors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """1 / s of every input channel of ``group``, or None where nothing was folded."""
    return 1.0 / spread(layer, group, factors[group.name]) if group.name in factors else None


def _folded_inputs(layer: nn.Module, group: Group, observed: Observed, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The original model's inputs as the folded layer's linears take them, x / s, one [tokens, columns] a sample."""
    inverse = _inverse_factors(layer, group, factors)
    inputs = observed.inputs.pop(group.name)
    return inputs if inverse is None else [x * inverse.to(x.device) for x in inputs]


def _folded_moments(layer: nn.Module, group: Group, observed: Observed, factors: dict[str, torch.Tensor]) -> Moments:
    """Second moments of the inputs that the folded layer's linears take, x / s, all of them the original model's."""
    hessian = observed.statistics[group.name].hessian
    assert hessian is not None
    inverse = _inverse_factors(layer, group, factors)
    return Moments(hessian if inverse is None else hessian * inverse * inverse[:, None])
