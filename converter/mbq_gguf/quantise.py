"""The walk through the decoder: which steps there are, and in which order."""

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
from mbq_gguf.settings import ALONE, QuantiseSettings
from mbq_gguf.transforms.rotation import check_rotatable
from mbq_gguf.walk import before, layer
from mbq_gguf.walk.state import Progress, Walk
from mbq_gguf.workdir import Item, Unkept, WorkDir

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
    """Quantise every decoder linear of ``loaded``, which is left as it is.

    ``work`` takes each finished layer and gives back those of an earlier run; the bytes are the same either way. ``progress`` is called
    with stage, done and total. Raises UsageError for an unknown type or a missing calibration set, UserError where a transform
    changes the model's function.
    """
    check_settings(loaded, samples, settings)
    walk = Walk(loaded, samples, settings, work or Unkept(), progress)
    for step in BEFORE:
        step(walk)
    with loaded.layers_alone(), walk.ahead, walk.behind:
        for index in range(len(loaded.decoder.layers)):
            quantise_layer(walk, index)
            progress("layers", index + 1, len(loaded.decoder.layers))
    before.finish(walk)
    return walk.result


def check_settings(loaded: LoadedModel, samples: Sized, settings: QuantiseSettings) -> None:
    """UsageError for settings that contradict each other, the samples or the model, of which an outline will do."""
    check_activations(settings)
    check_texts(settings)
    if not samples and settings.activations == "static":
        raise UsageError("static scales of activations are measured on samples: give at least one")
    quant_type(settings.type_name)
    if not samples and settings.pictures and (settings.target_bpw or settings.method != "rtn" or settings.rounding != "nearest"):
        raise UsageError(f"method {settings.method} with {settings.rounding} rounding needs samples: give at least one")
    if settings.learn_scales and not (settings.propagate_error and settings.rounding == "gptq"):
        raise UsageError("learning scales follows the rounded layers' inputs: give --learn-scales with --propagate-error and GPTQ")
    check_heads(loaded.decoder, settings)
    check_experts(loaded.decoder, settings)
    reason = loaded.decoder.layout.no_equalisation()
    if settings.method != "rtn" and reason:
        raise UsageError(f"{loaded.architecture} cannot be equalised, {reason}: use --method rtn")
    check_rotatable(loaded, settings.rotate)


def check_texts(settings: QuantiseSettings) -> None:
    """UsageError for what needs pictures and answers, where there are none."""
    if settings.pictures:
        return
    if settings.target_bpw or settings.method != "rtn" or settings.token_weights != "uniform" or settings.activations == "static":
        raise UsageError(
            f"a language model alone is calibrated on texts, without pictures and answers: with {ALONE} leave out --target-bpw, --method, "
            "--token-weights and --activations"
        )
    if settings.rounding == "gptq" and not settings.synthetic:
        raise UsageError(f"with {ALONE} GPTQ has the texts that the model writes and no other: give --synthetic 1 or more")


def check_heads(decoder: Decoder, settings: QuantiseSettings) -> None:
    """UsageError where llama.cpp will move columns by heads that are smaller than the type's blocks."""
    if settings.target_bpw and any(site.heads for site in decoder.layout.sites):
        raise UsageError("llama.cpp moves columns of this model by heads, which not all types can follow: give one --type, no --target-bpw")
    for module in decoder.layers:
        for site in decoder.layout.of(module).sites:
            for name in site.readers if site.heads else ():
                channels = attrgetter(site.heads or "")(module)
                kind = quant_type_for(settings.type_name, Layer(module, 0, decoder.layout).linear(name).in_features)
                block = quant_type(stored_as(kind.name)).block_size
                if channels % block:
                    raise UsageError(
                        f"llama.cpp moves the columns of {name} by heads of {channels}, which blocks of {block} ({kind.name}) cannot "
                        "follow: choose a type with smaller blocks, such as MBQ3S or Q4_0"
                    )


def check_experts(decoder: Decoder, settings: QuantiseSettings) -> None:
    """UsageError for what experts do not take: a type per matrix, static ranges, and weights by each token's gradient."""
    if not decoder.layout.stacks:
        return
    if settings.target_bpw:
        raise UsageError("the experts of a layer are one tensor of one type in llama.cpp: give one --type, no --target-bpw")
    if settings.activations == "static":
        raise UsageError("products of experts take no static ranges: leave out --activations static")
    if settings.token_weights == "token":
        raise UsageError("gradients of single tokens are not measured in experts: give other --token-weights")


def check_activations(settings: QuantiseSettings) -> None:
    """UsageError where the products of the type that is asked for take no static scales."""
    if settings.activations == "static" and (settings.target_bpw or quant_type(settings.type_name).name not in QUANT_TYPES):
        raise UsageError("static scales of activations belong to types with one scale per row: give --type W4A8 or W8A8")
    if settings.activations == "dynamic" and settings.range_estimator != QuantiseSettings.range_estimator:
        raise UsageError("--range-estimator belongs to static ranges: give --activations static too")


def quantise_layer(walk: Walk, index: int) -> None:
    """Quantise layer ``index``, or take it from the work directory, and move the walk behind it."""
    work = layer.enter_layer(walk, index)
    for following in walk.loaded.decoder.layers[index + 1 : index + 2]:
        walk.coming = ReadAhead(following, walk.loaded.device)
    found = walk.work.found(_item(index))
    if found:
        layer.put_back(work, Outcome(*found))
    else:
        for step in LAYER:
            step(work)
    if launch.first():  # which writes
        walk.behind.start(partial(_keep, walk, index, found, work.outcome, work.arriving))
    layer.leave_layer(work)


def _keep(walk: Walk, index: int, found: Item | None, outcome: Outcome, arriving: Callable[[], None]) -> None:
    """Enter layer ``index`` into the result: what an earlier run has ``found``, or this one's ``outcome``, when what is ``arriving`` is
    there and saved."""
    arriving()
    walk.result.add_layer(index, Outcome(*(found or walk.work.kept(_item(index), outcome.tensors, outcome.facts))))


def _item(index: int) -> str:
    """What layer ``index`` is called in the work directory."""
    return f"layer-{index:04d}"
