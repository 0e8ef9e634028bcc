"""Quantises the decoder layer by layer. The order of the steps is defined here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import partial
from operator import attrgetter

from mbq_gguf import launch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.errors import UsageError
from mbq_gguf.formats.registry import quant_type, quant_type_for
from mbq_gguf.formats.row_scale import QUANT_TYPES, stored_as
from mbq_gguf.models.decoder import Decoder
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.read_ahead import ReadAhead
from mbq_gguf.outcome import Outcome, QuantiseResult
from mbq_gguf.settings import LANGUAGE_ONLY, QuantiseSettings
from mbq_gguf.transforms.rotation import check_rotatable
from mbq_gguf.walk import before, layer
from mbq_gguf.walk.state import Progress, Walk
from mbq_gguf.workdir import Item, NoWorkDir, WorkDir

BEFORE = (
    before.capture_samples,
    before.measure_sensitivity,
    before.add_synthetic,
    before.measure_sinks,
    before.draw_rotation,
    before.enter_decoder,
    before.choose_types,
)
LAYER = (
    layer.pass_original,
    layer.smooth,
    layer.equalise,
    layer.check_function,
    layer.round_layer,
    layer.learn_scales,
    layer.keep_parameters,
    layer.measure_ranges,
    layer.measure_losses,
)


def quantise(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    settings: QuantiseSettings,
    work: WorkDir | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> QuantiseResult:
    """Quantise every decoder linear of ``loaded``, which is not changed.

    ``work`` stores each finished layer and restores those of an earlier run; the bytes are the same either way. ``progress`` is called with
    stage, done and total. Raises UsageError for an unknown type or a missing calibration set, UserError if a transform changes the model's
    function.
    """
    check_settings(loaded, samples, settings)
    walk = Walk(loaded, samples, settings, work or NoWorkDir(), progress)
    for step in BEFORE:
        step(walk)
    with loaded.layers_alone(), walk.ahead, walk.behind:
        for index in range(len(loaded.decoder.layers)):
            quantise_layer(walk, index)
            progress("layers", index + 1, len(loaded.decoder.layers))
    before.finish(walk)
    return walk.result


def check_settings(loaded: LoadedModel, samples: Sized, settings: QuantiseSettings) -> None:
    """Raise UsageError for settings that conflict with each other, the samples or the model, which may be without weights."""
    check_activations(settings)
    check_texts(settings)
    if not samples and settings.activations == "static":
        raise UsageError("static activation scales are measured on samples: give at least one")
    quant_type(settings.type_name)
    if not samples and settings.pictures and (settings.target_bpw or settings.method != "rtn" or settings.rounding != "nearest"):
        raise UsageError(f"method {settings.method} with {settings.rounding} rounding needs samples: give at least one")
    if settings.learn_scales and not (settings.propagate_error and settings.rounding == "gptq"):
        raise UsageError("learning scales needs the quantised layers' inputs: give --learn-scales with --propagate-error and GPTQ")
    check_heads(loaded.decoder, settings)
    check_experts(loaded.decoder, settings)
    reason = loaded.decoder.layout.no_equalisation()
    if settings.method != "rtn" and reason:
        raise UsageError(f"{loaded.architecture} cannot be equalised, {reason}: use --method rtn")
    check_rotatable(loaded, settings.rotate)


def check_texts(settings: QuantiseSettings) -> None:
    """Raise UsageError for settings that need pictures and answers, if there are none."""
    if settings.pictures:
        return
    if settings.target_bpw or settings.method != "rtn" or settings.token_weights != "uniform" or settings.activations == "static":
        raise UsageError(
            f"with {LANGUAGE_ONLY} calibration has texts only, no pictures and answers: leave out --target-bpw, --method, --token-weights "
            "and --activations"
        )
    if settings.rounding == "gptq" and not settings.synthetic:
        raise UsageError(f"with {LANGUAGE_ONLY} GPTQ uses only texts that the model generates: give --synthetic 1 or more")


def check_heads(decoder: Decoder, settings: QuantiseSettings) -> None:
    """Raise UsageError if llama.cpp will permute columns by heads that are not whole blocks of the type."""
    if settings.target_bpw and any(site.heads for site in decoder.layout.sites):
        raise UsageError("llama.cpp permutes columns of this model by heads, which not all types allow: give one --type, no --target-bpw")
    for module in decoder.layers:
        for site in decoder.layout.of(module).sites:
            for name in site.readers if site.heads else ():
                channels = attrgetter(site.heads or "")(module)
                kind = quant_type_for(settings.type_name, Layer(module, 0, decoder.layout).linear(name).in_features)
                block = quant_type(stored_as(kind.name)).block_size
                if channels % block:
                    raise UsageError(
                        f"llama.cpp permutes the columns of {name} by heads of {channels}, which are not whole blocks of {block} "
                        f"({kind.name}): choose a type with smaller blocks, such as MBQ3S or Q4_0"
                    )


def check_experts(decoder: Decoder, settings: QuantiseSettings) -> None:
    """Raise UsageError for what experts do not support: a type per matrix, static ranges, and per-token gradient weights."""
    if not decoder.layout.stacks:
        return
    if settings.target_bpw:
        raise UsageError("the experts of a layer are one tensor of one type in llama.cpp: give one --type, no --target-bpw")
    if settings.activations == "static":
        raise UsageError("products of experts do not support static ranges: leave out --activations static")
    if settings.token_weights == "token":
        raise UsageError("per-token gradients are not measured in experts: give other --token-weights")


def check_activations(settings: QuantiseSettings) -> None:
    """Raise UsageError if the type's products do not support static activation scales."""
    if settings.activations == "static" and (settings.target_bpw or quant_type(settings.type_name).name not in QUANT_TYPES):
        raise UsageError("static activation scales need a type with one scale per row: give --type W4A8 or W8A8")
    if settings.activations == "dynamic" and settings.range_estimator != QuantiseSettings.range_estimator:
        raise UsageError("--range-estimator is for static ranges: also give --activations static")


def quantise_layer(walk: Walk, index: int) -> None:
    """Quantise layer ``index``, or restore it from the work directory, and advance the walk past it."""
    work = layer.enter_layer(walk, index)
    for following in walk.loaded.decoder.layers[index + 1 : index + 2]:
        walk.coming = ReadAhead(following, walk.loaded.device, walk.coming)
    found = walk.work.found(_item(index))
    if found:
        layer.put_back(work, Outcome(*found))
    else:
        for step in LAYER:
            step(work)
    if launch.first():  # the process that writes
        walk.behind.start(partial(_keep, walk, index, found, work.outcome, work.arriving))
    layer.leave_layer(work)


def _keep(walk: Walk, index: int, found: Item | None, outcome: Outcome, arriving: Callable[[], None]) -> None:
    """Add layer ``index`` to the result: as ``found`` from an earlier run, or this run's ``outcome``, once it has arrived and is saved."""
    arriving()
    walk.result.add_layer(index, Outcome(*(found or walk.work.kept(_item(index), outcome.tensors, outcome.facts))))


def _item(index: int) -> str:
    """The name of layer ``index`` in the work directory."""
    return f"layer-{index:04d}"
