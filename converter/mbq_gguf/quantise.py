"""The walk through the decoder: calibrate, rotate, equalise and round one layer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch

from mbq_gguf.allocation.allocate import allocate, total_weight
from mbq_gguf.allocation.plan import Plan
from mbq_gguf.allocation.predict import Inputs, measured_costs
from mbq_gguf.calibration.calls import Entering
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import Moments, Replay
from mbq_gguf.calibration.observe import Observed, TokenWeights, observe
from mbq_gguf.calibration.precision import bf16_products
from mbq_gguf.calibration.sensitivity import Sensitivity, measure
from mbq_gguf.calibration.stream import advance, capture, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.synthetic import synthetic_streams, written
from mbq_gguf.calibration.token_weights import hessian_weights, modality, uniform
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.outcome import LayerWork, Packed, QuantiseResult, restored_layer, saved_layer
from mbq_gguf.rounding.learned import learn
from mbq_gguf.rounding.sequence import Matrix, Refinement, round_in_order
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.transforms.fold import repeats
from mbq_gguf.transforms.folded import folded_inputs, folded_moments
from mbq_gguf.transforms.layer import Judge, changed_parameters, fold_layer, search_layer
from mbq_gguf.transforms.preserved import FunctionCheck
from mbq_gguf.transforms.rotation import Rotation, check_rotatable, draw, rotate_layer, rotated_ends, rotated_projector
from mbq_gguf.transforms.smooth import smooth_layer
from mbq_gguf.workdir import WorkDir

Progress = Callable[[str, int, int], None]  # stage, done, total
ROTATION_SEED = 0


def quantise(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    settings: QuantiseSettings,
    work: WorkDir | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> QuantiseResult:
    """Quantise every decoder linear of ``loaded``, which is left as it is.

    ``work`` takes each finished layer and gives back those of an earlier run; the bytes are the same either way. ``progress`` is called
    with stage, done and total. Raises UsageError for an unknown type or a missing calibration set, UserError where a transform
    changes the model's function.
    """
    quant_type(settings.type_name)
    if not samples and (settings.target_bpw or settings.method != "rtn" or settings.rounding != "nearest"):
        raise UsageError(f"method {settings.method} with {settings.rounding} rounding needs samples: give at least one")
    if settings.learn_scales and not (settings.propagate_error and settings.rounding == "gptq"):
        raise UsageError("learning scales follows the rounded layers' inputs: give --learn-scales with --propagate-error and GPTQ")
    reason = loaded.decoder.layout.no_equalisation()
    if settings.method != "rtn" and reason:
        raise UsageError(f"{loaded.architecture} cannot be equalised, {reason}: use --method rtn")
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
        self.sensitivity: Sensitivity | None = None
        self.rotation: Rotation | None = None
        self.streams: list[Streamed] = []  # inputs of the next layer in the original model (in the rotated basis)
        self.prefix: list[Streamed] = []  # the same in the rounded model, where propagate_error asks for them
        self.check: FunctionCheck | None = None

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Capture the samples, measure sensitivities where they are asked for, rotate, and allocate types."""
        with self._timed("capture"):
            for number, stream in enumerate(capture(self.loaded, samples, self.settings.answer_mask)):
                self.streams.append(stream)
                self.progress("capture", number + 1, len(samples))
        if self.settings.method == "mbq" or self.settings.token_weights != "uniform" or self.settings.target_bpw:
            self.sensitivity = self._sensitivity()
            if self.settings.method == "mbq":
                self.result.ratios = self.sensitivity.ratios(self.settings.floor)
            for stream, salience in zip(self.streams, self.sensitivity.salience, strict=False):
                stream.salience = salience
        if samples and self.settings.synthetic:
            self._synthesise(samples)
        if self.settings.rotate != "none":
            check_rotatable(self.loaded)
            self.rotation = draw(self.loaded.decoder, self.settings.rotate, ROTATION_SEED)
            self.result.hadamard = self.rotation.block
        if self.settings.method != "rtn" or self.rotation:
            self.check = FunctionCheck(self.loaded, self.streams, self.rotation)
        if self.rotation:
            for stream in self.streams:
                stream.hidden = (stream.hidden.double() @ self.rotation.residual).to(stream.hidden)
        if self.settings.follows_prefix:
            self.prefix = [replace(stream) for stream in self.streams]
        if self.settings.target_bpw:
            self.result.plan = self._plan(self.settings.target_bpw)

    def _synthesise(self, samples: Sequence[Sample]) -> None:
        """Add the synthetic samples; sensitivities were measured without them, for they have no answers."""
        saved = self.work.load("texts") if self.work else None
        count, progress = self.settings.synthetic, self.progress
        with self._timed("texts"), bf16_products():
            texts = saved[0]["ids"] if saved else written(self.loaded, count, lambda done, total: progress("write texts", done, total))
        if self.work and not saved:
            self.work.save("texts", {"ids": texts}, None)
        with self._timed("capture"):
            for number, stream in enumerate(synthetic_streams(self.loaded, texts, samples)):
                self.streams.append(stream)
                progress("synthetic", number + 1, count + count // 2)

    def _sensitivity(self) -> Sensitivity:
        saved = self.work.load("sensitivity") if self.work else None
        if saved is not None:
            return Sensitivity.restored(saved[0])
        fisher = self.settings.token_weights == "token" or self.settings.target_bpw is not None
        with self._timed("sensitivity"), bf16_products():
            found = measure(self.loaded, self.streams, lambda done, total: self.progress("sensitivity", done, total), fisher=fisher)
        if self.work:
            self.work.save("sensitivity", found.tensors(), None)
        return found

    def _plan(self, target: float) -> Plan:
        saved = self.work.load("plan") if self.work else None
        if saved is not None:
            return Plan(**saved[1])
        assert self.sensitivity is not None
        with self._timed("allocation"):
            plan = allocate(
                len(self.loaded.decoder.layers),
                self._rotated_layer,
                self.streams,
                self._token_weights,
                self.sensitivity.fisher,
                damping=self.settings.damping if self.settings.rounding == "gptq" else None,
                clip=self.settings.clip,
                target=target,
                progress=lambda done, total: self.progress("allocation", done, total),
            )
        if self.work:
            self.work.save("plan", {}, asdict(plan))
        return plan

    def _token_weights(self, index: int) -> TokenWeights:
        settings = self.settings
        return hessian_weights(
            settings.token_weights, self.loaded.decoder.layout, index, self.sensitivity, settings.prompt_weight, settings.floor
        )

    def _type_names(self, index: int) -> dict[str, str]:
        """The type wanted for each reader of layer ``index``; those of one linear have the same."""
        plan, layout = self.result.plan, self.loaded.decoder.layout
        return {
            name: plan.type_names[f"layers.{index}.{layout.linear_of(name)}.weight"] if plan else self.settings.type_name
            for name in layout.readers
        }

    def _rotated_layer(self, index: int) -> Layer:
        layer = working_layer(self.loaded, index)
        if self.rotation:
            rotate_layer(layer, self.rotation)
        return layer

    def layer(self, index: int) -> None:
        """Quantise layer ``index``, or take it from the work directory, and move the streams past it."""
        layer = self._rotated_layer(index)
        replay = Replay(layer, self.prefix)
        name = f"layer-{index:04d}"
        done = restored_layer(self.work.load(name)) if self.work else None
        if done is None:
            done = self._quantise_layer(layer, replay)
            if self.work:
                self.work.save(name, *saved_layer(done))
        else:
            with self._timed("observe"), bf16_products():
                advance(layer, self.streams)
            fold_layer(layer, done.factors)
            self._check(layer)
            for key, packed in done.packed.items():
                weight = torch.from_numpy(quant_type(packed.type_name).dequantize(packed.data))
                layer.linear(key.removesuffix(".weight")).weight.data.copy_(weight)
        with self._timed("moments"), bf16_products():
            replay.advance()
        self._collect(index, done)

    def _quantise_layer(self, layer: Layer, replay: Replay) -> LayerWork:
        settings, index = self.settings, layer.index
        weights, type_names = self._token_weights(index), self._type_names(index)
        share = settings.error_correction if settings.propagate_error else 0.0
        refinement = Refinement(settings.damping, settings.clip, share, settings.refits)
        gptq = refinement if settings.rounding == "gptq" else None
        of_originals = self.result.plan is not None or (gptq and (settings.method != "rtn" or not settings.follows_prefix))
        entering = Entering(layer, [replace(stream) for stream in self.streams])
        corrected = gptq is not None and refinement.error_correction > 0
        with self._timed("observe"), bf16_products():
            observed = observe(
                layer,
                self.streams,
                hessian_weights=weights if of_originals else None,
                keep_inputs=corrected,
            )
        done = LayerWork({}, {}, {}, {})
        if settings.method == "smoothquant":
            done.factors = smooth_layer(entering, self._foldable(layer))
            fold_layer(layer, done.factors)
        elif settings.method != "rtn":
            with self._timed("search"):
                prefix = Entering(layer, self.prefix) if settings.follows_prefix else None
                judge = Judge(self._search_weights(index), settings.power, settings.search_samples, gptq, observed.hessians)
                choices = search_layer(entering, prefix, type_names, judge, self._foldable(layer))
            done.factors = {name: choice.factors for name, choice in choices.items()}
            done.exponents = {name: choice.exponent for name, choice in choices.items()}
            fold_layer(layer, done.factors)
        done.replaced = changed_parameters(layer, working_layer(self.loaded, index))
        self._check(layer)

        def moments_of(site: Site) -> Moments | None:
            if settings.rounding == "nearest":
                return None
            if settings.follows_prefix:
                originals = folded_inputs(layer, site, observed, done.factors) if corrected else None
                with self._timed("moments"), bf16_products():
                    return replay.moments(site, weights, originals)
            return folded_moments(layer, site, observed, done.factors)

        with self._timed("rounding"):
            before = (
                {name: layer.linear(name).weight.detach().clone() for name in self.loaded.decoder.layout.readers}
                if self.result.plan
                else {}
            )
            matrices = round_in_order(layer, type_names, moments_of, refinement)
        if settings.learn_scales:
            with self._timed("refine"), bf16_products():
                matrices = self._learned(layer, matrices)
            replay.restart()
        for name, parts in layer.layout.by_linear(matrices).items():
            data = np.concatenate([part.rounded.data for part in parts])
            done.packed[f"{name}.weight"] = Packed(parts[0].type_name, data, parts[0].rounded.weight.shape[1])
        if self.result.plan:
            done.losses = self._losses(layer, before, observed, done.factors)
        return done

    def _learned(self, layer: Layer, matrices: dict[str, Matrix]) -> dict[str, Matrix]:
        """``matrices`` with the parameters that learning found better, put into ``layer``."""
        coded = {name: (matrix.grid, matrix.coded) for name, matrix in matrices.items() if matrix.grid and matrix.coded}
        targets = [stream.hidden for stream in self.streams]  # they have passed the original layer already
        found = learn(layer, self.prefix, targets, self._token_weights(layer.index), coded, self.settings.learn_scales)
        for name, better in found.items():
            grid = coded[name][0]
            matrices[name] = Matrix(matrices[name].type_name, better.rounded(grid), grid, better)
            layer.linear(name).weight.data.copy_(matrices[name].rounded.weight)
        return matrices

    def _losses(
        self, layer: Layer, before: dict[str, torch.Tensor], observed: Observed, factors: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """What rounding ``layer`` has cost by the measure that chose its types, by parameter name."""
        assert self.sensitivity is not None
        weights, inputs = self._token_weights(layer.index), {}
        for site in layer.sites:
            inputs[site.name] = Inputs(folded_moments(layer, site, observed, factors).hessian, total_weight(self.streams, weights, site))
        fisher = {name: float(values[layer.index]) for name, values in self.sensitivity.fisher.items()}
        costs = measured_costs(layer, before, inputs, fisher, factors)
        return {f"{name}.weight": sum(parts) for name, parts in layer.layout.by_linear(costs).items()}

    def _search_weights(self, index: int) -> TokenWeights:
        """How much each token counts where candidates of layer ``index`` are compared."""
        if self.settings.method == "awq":
            return uniform
        ratios = self.result.ratios
        if self.settings.power == 2:  # means over the tokens of each modality, where absolute errors are summed
            asked = [stream for stream in self.streams if stream.labels.any()][: self.settings.search_samples]
            answer, vision = (sum(int(getattr(stream, name).sum()) for stream in asked) for name in ("answer", "vision"))
            share = answer / max(1, vision)
            ratios = {block: [share * ratio for ratio in of_layers] for block, of_layers in ratios.items()}
        return modality(ratios, index)

    def _foldable(self, layer: Layer) -> tuple[Site, ...]:
        """Groups that take channel factors: not down_proj where a Hadamard transform lies between it and up_proj, nor o_proj under grouped
        queries where the settings leave it alone."""
        left = {"down"} if self.result.hadamard else set()
        if not self.settings.grouped_o:
            left |= {site.name for site in layer.sites if repeats(layer, site) > 1}
        return tuple(site for site in layer.sites if site.name not in left)

    def _check(self, layer: Layer) -> None:
        if self.check:
            self.check.layer(layer)

    def finish(self) -> QuantiseResult:
        """Check the logits, and add what lies at the ends of the decoder."""
        ends = rotated_ends(self.loaded.decoder, self.rotation) if self.rotation else {}
        if self.check:
            self.check.logits(ends)
        self.result.replaced.update(ends)
        if self.rotation:
            self.result.projector = rotated_projector(self.loaded, self.rotation)
        return self.result

    def _collect(self, index: int, done: LayerWork) -> None:
        result, prefix = self.result, f"layers.{index}"
        wanted = {f"{self.loaded.decoder.layout.linear_of(name)}.weight": kind for name, kind in self._type_names(index).items()}
        result.losses.update({f"{prefix}.{name}": loss for name, loss in done.losses.items()})
        for name, packed in done.packed.items():
            result.packed[f"{prefix}.{name}"] = packed
            if packed.type_name != wanted[name]:
                result.fallbacks.append((f"{prefix}.{name}", packed.type_name))
        result.replaced.update({f"{prefix}.{name}": value.cpu() for name, value in done.replaced.items()})
        if done.exponents:
            result.exponents[prefix] = done.exponents

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.result.seconds[stage] = self.result.seconds.get(stage, 0.0) + time.perf_counter() - start
