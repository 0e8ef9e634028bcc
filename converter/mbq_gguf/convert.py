"""The whole way from a Hugging Face directory to a text GGUF and an mmproj GGUF: check, load, calibrate, equalise, round, write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from mbq_gguf import launch
from mbq_gguf.allocation.plan import plan_table
from mbq_gguf.beforehand import check_inputs, check_tower, look_ahead
from mbq_gguf.calibration.dataset import Drawn, Sample, draw_samples, fingerprint
from mbq_gguf.calibration.spill import spilling
from mbq_gguf.convert_options import ConvertOptions as ConvertOptions
from mbq_gguf.cost import sites_of
from mbq_gguf.errors import UserError
from mbq_gguf.export import metadata
from mbq_gguf.export.atomic import check_gguf_output, claimed, staged
from mbq_gguf.export.gguf_writer import TextFile, VisionFile, write_mmproj, write_text
from mbq_gguf.export.injection import TensorRecord
from mbq_gguf.export.progress import Stages, progress_bars
from mbq_gguf.export.report import (
    ConvertReport,
    fallback_sentences,
    nearest_sentences,
    static_sentences,
    tower_sentences,
    transform_sentences,
)
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.memory import available, own
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.alone import language_model_alone
from mbq_gguf.models.checks import check_finite
from mbq_gguf.models.load import outline
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.parallel import together
from mbq_gguf.quantise import quantise
from mbq_gguf.quantise_tower import quantise_tower
from mbq_gguf.room import to_round
from mbq_gguf.timing import Timer
from mbq_gguf.workdir import WorkDir, open_workdir

FREE_SHARE = 0.7  # of the memory that is free before a conversion: activations beyond it go to disk
BASE_TYPE = "BF16"  # matrices of a quantised file that no method touches; checkpoints are BF16 today, so nothing is lost


@dataclass(frozen=True)
class Quantised:
    """The outcome of calibration, equalisation and rounding, with what the file's metadata say of it."""

    result: QuantiseResult
    fingerprint: str
    samples: int
    tower: VisionFile | None = None  # None: the checkpoint's own


def convert(options: ConvertOptions, console: Console, told: Callable[[str, int, int], None] | None = None) -> ConvertReport:
    """Write ``options.out`` and the mmproj file beside it, with progress on ``console``; ``told`` hears each stage, done and total.

    Both files appear when both are whole; a run that was stopped goes on after its last finished layer. Raises UserError or UsageError
    for everything a user can mend: directory, architecture, weights, images, types, and output paths and disks.
    """
    check_gguf_output(options.out)
    check_gguf_output(options.mmproj)
    shared = [] if options.work_dir is None else [options.work_dir]
    alone = language_model_alone(options.language_model_only)
    with claimed(options.out, options.mmproj, *shared), remote_code(options.trust_remote_code), alone:
        return _convert(options, console, told)


def _convert(options: ConvertOptions, console: Console, told: Callable[[str, int, int], None] | None) -> ConvertReport:
    state = options.model_state
    files = check_inputs(options)
    set_threads(options)
    timer = Timer()
    with progress_bars(console) as bars:
        stages = Stages(bars, told)
        quantised: Quantised | None = None
        tower: VisionFile | None = None
        if options.unquantised:
            with timer.timed("check"):
                check_finite(files, partial(stages, "check weights"))
            if options.changes_tower:
                tower = run_tower_alone(options, console, stages, timer)
        else:
            quantised = run_quantisation(options, console, stages, timer)
            tower = quantised.tower
        with timer.timed("write"):
            text, vision = write_files(options, quantised, tower, stages, state)
    weights = {} if quantised is None else {name: (w.type_name, w.columns) for name, w in quantised.result.quantised.items()}
    plan = None if quantised is None else quantised.result.plan
    sentences = fallback_sentences(quant_type(options.type).name, {} if plan else weights, text)
    if options.rounding == "gptq":
        sentences += nearest_sentences(name for name, _ in weights.values())
    if quantised and quantised.result.hadamard:
        sentences += transform_sentences(name for name, _ in weights.values())
    if quantised:
        sentences += static_sentences(quantised.result.facts_of("metadata"))
    if tower:
        sentences += tower_sentences(tower.metadata)
    allocation = plan_table(plan, quantised.result.losses) if quantised and plan else None
    if options.work_dir is None:
        shutil.rmtree(options.work_root, ignore_errors=True)
    before = sum(file.stat().st_size for file in files)
    mmproj = None if options.language_model_only else options.mmproj
    return ConvertReport(options.out, mmproj, text, vision, before, sentences, timer.seconds, allocation, calibrated(options, quantised))


def assist(options: ConvertOptions) -> None:
    """What every process but the first of several does: it computes with the first, and writes nothing. Raises as :func:`convert` does."""
    if options.unquantised:
        return
    console = Console(quiet=True)
    alone = language_model_alone(options.language_model_only)
    with remote_code(options.trust_remote_code), alone, progress_bars(console) as bars:
        check_inputs(options)
        set_threads(options)
        run_quantisation(options, console, Stages(bars), Timer())


def set_threads(options: ConvertOptions) -> None:
    """The threads that were asked for; of several processes, which torchrun gives one thread each, an equal share of the processor."""
    if options.threads:
        torch.set_num_threads(options.threads)
    elif launch.neighbours() > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.neighbours()))


def calibrated(options: ConvertOptions, quantised: Quantised | None) -> str:
    """How much a file was calibrated on, in a sentence; "" where it was not."""
    if quantised and options.language_model_only and options.rounding == "gptq":
        return f"calibrated on {options.synthetic} texts of the model's own alone: it has seen no token of a picture"
    if quantised is None or not quantised.samples:
        return ""
    beside = f", {options.synthetic} texts of the model's own and {options.synthetic // 2} made pictures" if options.synthetic else ""
    asked = f" ({options.samples} were asked for)" if quantised.samples < options.samples else ""
    return f"calibrated on {quantised.samples} samples{asked} of {options.calib or 'the drawn scenes of mbq-gguf'}{beside}"


def run_quantisation(options: ConvertOptions, console: Console, stages: Stages, timer: Timer) -> Quantised:
    """Look at all that can be refused, load the model, calibrate, equalise and round."""
    say = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with timer.timed("check"):
        ahead = look_ahead(options, say)
    options = ahead.options
    with together(options.device):
        with timer.timed("load"):
            loaded = load(options.model_dir, options.device, prompts=ahead.model.prompts, progress=partial(stages, "check weights"))
        with timer.timed("samples"):
            samples = ahead.drawn.answered(loaded, say) if ahead.drawn else []
        calibration = fingerprint(samples) if samples else ""
        work = open_work(options, calibration, say)
        try:
            with spilling(host_bytes(options), work.path, round(to_round(sites_of(loaded)))):
                result = quantise(loaded, samples, options.settings, work, stages)
        finally:
            if launch.first() and options.work_dir is None and not any(work.path.glob("*.safetensors")):
                shutil.rmtree(options.work_root, ignore_errors=True)  # nothing to go on from
    timer.seconds.update(result.seconds)
    if not launch.first():
        return Quantised(result, calibration, len(samples))
    turned = VisionFile({}, result.tensors_of("vision"), result.facts_of("vision"))
    return Quantised(result, calibration, len(samples), change_tower(options, loaded, samples, turned, stages, timer))


def host_bytes(options: ConvertOptions) -> int:
    """What the process may hold of the host's memory before activations go to disk."""
    if options.memory is not None:
        return round(options.memory * 1e9)
    return own() + round(FREE_SHARE * available(torch.device("cpu")) / launch.neighbours())


def run_tower_alone(options: ConvertOptions, console: Console, stages: Stages, timer: Timer) -> VisionFile:
    """Load the model and change its tower, where the language model stays as it is."""
    say = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with timer.timed("check"):
        model = outline(options.model_dir)
        check_tower(options, model)
        calibrates = options.tower_type is not None and options.rounding == "gptq"
        drawn = draw_samples(options.calib, model.prompts, options.samples, options.seed, options.turns, say) if calibrates else Drawn()
    with timer.timed("load"):
        loaded = load(options.model_dir, options.device, prompts=model.prompts, progress=partial(stages, "check weights"))
    samples = drawn.answered(loaded, say) if drawn else []
    return change_tower(options, loaded, samples, VisionFile(), stages, timer)


def change_tower(
    options: ConvertOptions, loaded: LoadedModel, samples: Sequence[Sample], turned: VisionFile, stages: Stages, timer: Timer
) -> VisionFile:
    """The vision file's tensors and metadata; ``turned`` is what the decoder's quantisation has changed of it. The tower of ``loaded`` is
    changed in place."""
    if not options.changes_tower:
        return turned
    with timer.timed("tower"):
        settings = options.tower_settings(check_tower(options, loaded))
        return quantise_tower(loaded, settings, samples if options.rounding == "gptq" else [], turned, partial(stages, "tower"))


def open_work(options: ConvertOptions, calibration: str, tell: Callable[[str], object]) -> WorkDir:
    """The work directory of this model, these samples, these settings and this code; ``tell`` hears of damage in it. Of several processes
    the first alone opens it."""
    fingerprints = options.fingerprints | {"data": calibration}
    if not launch.first():
        return WorkDir(options.work_dir or options.work_root, "")
    if options.work_dir is not None:
        return open_workdir(options.work_dir, fingerprints, tell)
    return open_workdir(options.work_root / hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16], fingerprints, tell)


def write_files(
    options: ConvertOptions, quantised: Quantised | None, tower: VisionFile | None, stages: Stages, state: str
) -> tuple[list[TensorRecord], list[TensorRecord]]:
    """Both files, under their names when both are whole; ``tower`` None is the checkpoint's. Of a language model alone one file.

    Raises UserError where the model's files have changed since they were in ``state``: layers are read when their turn comes.
    """
    finals = [options.out] if options.language_model_only else [options.out, options.mmproj]
    vision: list[TensorRecord] = []
    with staged(*reversed(finals)) as parts:
        if not options.language_model_only:
            vision = write_mmproj(options.model_dir, parts[0], options.mmproj_type, tower or VisionFile(), stages.counter("write mmproj"))
        text = write_text(options.model_dir, parts[-1], text_file(options, quantised), stages.counter("write GGUF"))
        if options.model_state != state:
            raise UserError(f"files in {options.model_dir} were changed while it was converted: give the same command again")
    return text, vision


def text_file(options: ConvertOptions, quantised: Quantised | None) -> TextFile:
    """What goes into the text GGUF."""
    chosen = quant_type(options.type)
    if quantised is None:
        return TextFile({}, {}, chosen.name, chosen.name, {}, None)
    result = quantised.result
    keys = metadata.describe(
        type_name="mixed" if result.plan else chosen.name,
        method=options.method,
        rounding=options.rounding,
        fingerprint=quantised.fingerprint,
        samples=quantised.samples,
        synthetic=options.synthetic if quantised.samples or options.language_model_only else 0,
        ratios=result.ratios,
        token_weights=options.token_weights,
    )
    if options.rounding == "gptq":
        keys |= metadata.gptq(
            clip=options.clip,
            propagate_error=options.propagate_error,
            error_correction=options.error_correction,
            refits=options.refits,
            learn_scales=options.learn_scales,
        )
    if result.plan:
        keys |= metadata.allocated(result.plan, result.losses)
    keys |= result.facts_of("metadata")
    kind = result.plan.main if result.plan else chosen.name
    return TextFile(result.quantised, result.replaced, BASE_TYPE, quant_type(options.embedding_type).name, keys, metadata.file_type(kind))
