"""Converts a Hugging Face directory to a text GGUF and an mmproj GGUF: check, load, calibrate, equalise, round, write."""

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
from mbq_gguf.memory import available, process_bytes
from mbq_gguf.memory_estimate import rounding_bytes
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.checks import check_finite
from mbq_gguf.models.language_only import language_only_mode
from mbq_gguf.models.load import load_meta
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.parallel import process_group
from mbq_gguf.preflight import check_inputs, check_tower, run_preflight
from mbq_gguf.quantise import quantise
from mbq_gguf.quantise_tower import quantise_tower
from mbq_gguf.timing import Timer
from mbq_gguf.workdir import WorkDir, open_workdir

FREE_SHARE = 0.7  # share of the free memory to use; activations beyond it are spilled to disk
BASE_TYPE = "BF16"  # type of matrices that are not quantised; checkpoints are BF16 today, so nothing is lost


@dataclass(frozen=True)
class Quantised:
    """The result of calibration, equalisation and rounding, with facts for the file's metadata."""

    result: QuantiseResult
    fingerprint: str
    samples: int
    tower: VisionFile | None = None  # None: the checkpoint's own tower


def convert(options: ConvertOptions, console: Console, on_progress: Callable[[str, int, int], None] | None = None) -> ConvertReport:
    """Write ``options.out`` and the mmproj file beside it, with progress on ``console``; ``on_progress`` gets stage, done and total.

    Both files appear when both are complete; an interrupted run resumes after its last finished layer. Raises UserError or UsageError for
    everything that a user can fix: directory, architecture, weights, images, types, output paths and disks.
    """
    check_gguf_output(options.out)
    check_gguf_output(options.mmproj)
    shared = [] if options.work_dir is None else [options.work_dir]
    alone = language_only_mode(options.language_model_only)
    with claimed(options.out, options.mmproj, *shared), remote_code(options.trust_remote_code), alone:
        return _convert(options, console, on_progress)


def _convert(options: ConvertOptions, console: Console, on_progress: Callable[[str, int, int], None] | None) -> ConvertReport:
    state = options.model_state
    files = check_inputs(options)
    set_threads(options)
    timer = Timer()
    with progress_bars(console) as bars:
        stages = Stages(bars, on_progress)
        quantised: Quantised | None = None
        tower: VisionFile | None = None
        if options.unquantised:
            with timer.timed("check"):
                check_finite(files, partial(stages, "check weights"))
            if options.changes_tower:
                tower = run_tower_only(options, console, stages, timer)
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
    return ConvertReport(
        options.out, mmproj, text, vision, before, sentences, timer.seconds, allocation, calibration_sentence(options, quantised)
    )


def run_worker(options: ConvertOptions) -> None:
    """The part of processes other than the first: compute together with it and write nothing. Raises like :func:`convert`."""
    if options.unquantised:
        return
    console = Console(quiet=True)
    alone = language_only_mode(options.language_model_only)
    with remote_code(options.trust_remote_code), alone, progress_bars(console) as bars:
        check_inputs(options)
        set_threads(options)
        run_quantisation(options, console, Stages(bars), Timer())


def set_threads(options: ConvertOptions) -> None:
    """Use the requested number of threads, or an equal share of the cores for each of several processes (torchrun sets one thread)."""
    if options.threads:
        torch.set_num_threads(options.threads)
    elif launch.neighbours() > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.neighbours()))


def calibration_sentence(options: ConvertOptions, quantised: Quantised | None) -> str:
    """A sentence that says what a file was calibrated on; "" if it was not calibrated."""
    if quantised and options.language_model_only and options.rounding == "gptq":
        return f"calibrated only on {options.synthetic} texts that the model generated: it has seen no picture tokens"
    if quantised is None or not quantised.samples:
        return ""
    beside = (
        f", {options.synthetic} texts that the model generated and {options.synthetic // 2} procedural pictures"
        if options.synthetic
        else ""
    )
    asked = f" ({options.samples} were asked for)" if quantised.samples < options.samples else ""
    return f"calibrated on {quantised.samples} samples{asked} of {options.calib or 'the drawn scenes of mbq-gguf'}{beside}"


def run_quantisation(options: ConvertOptions, console: Console, stages: Stages, timer: Timer) -> Quantised:
    """Run the remaining checks, load the model, calibrate, equalise and round."""
    say = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with timer.timed("check"):
        ahead = run_preflight(options, say)
    options = ahead.options
    with process_group(options.device):
        with timer.timed("load"):
            loaded = load(options.model_dir, options.device, prompts=ahead.model.prompts, progress=partial(stages, "check weights"))
        with timer.timed("samples"):
            samples = ahead.drawn.answered(loaded, say) if ahead.drawn else []
        calibration = fingerprint(samples) if samples else ""
        work = open_work(options, calibration, say)
        try:
            with spilling(host_limit(options), work.path, round(rounding_bytes(sites_of(loaded), options.settings))):
                result = quantise(loaded, samples, options.settings, work, stages)
        finally:
            if launch.first() and options.work_dir is None and not any(work.path.glob("*.safetensors")):
                shutil.rmtree(options.work_root, ignore_errors=True)  # nothing to resume from
    timer.seconds.update(result.seconds)
    if not launch.first():
        return Quantised(result, calibration, len(samples))
    rotated = VisionFile({}, result.tensors_of("vision"), result.facts_of("vision"))
    return Quantised(result, calibration, len(samples), change_tower(options, loaded, samples, rotated, stages, timer))


def host_limit(options: ConvertOptions) -> int:
    """Bytes of host memory that the process may use before activations are spilled to disk."""
    if options.memory is not None:
        return round(options.memory * 1e9)
    return process_bytes() + round(FREE_SHARE * available(torch.device("cpu")) / launch.neighbours())


def run_tower_only(options: ConvertOptions, console: Console, stages: Stages, timer: Timer) -> VisionFile:
    """Load the model and change only its tower."""
    say = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with timer.timed("check"):
        model = load_meta(options.model_dir)
        check_tower(options, model)
        calibrates = options.tower_type is not None and options.rounding == "gptq"
        drawn = draw_samples(options.calib, model.prompts, options.samples, options.seed, options.turns, say) if calibrates else Drawn()
    with timer.timed("load"):
        loaded = load(options.model_dir, options.device, prompts=model.prompts, progress=partial(stages, "check weights"))
    samples = drawn.answered(loaded, say) if drawn else []
    return change_tower(options, loaded, samples, VisionFile(), stages, timer)


def change_tower(
    options: ConvertOptions, loaded: LoadedModel, samples: Sequence[Sample], rotated: VisionFile, stages: Stages, timer: Timer
) -> VisionFile:
    """The vision file's tensors and metadata. ``rotated`` has the tensors that the decoder's rotation has changed. Changes the tower of
    ``loaded`` in place."""
    if not options.changes_tower:
        return rotated
    with timer.timed("tower"):
        settings = options.tower_settings(check_tower(options, loaded))
        return quantise_tower(loaded, settings, samples if options.rounding == "gptq" else [], rotated, partial(stages, "tower"))


def open_work(options: ConvertOptions, calibration: str, tell: Callable[[str], object]) -> WorkDir:
    """Open the work directory for this model, samples, settings and code; ``tell`` receives messages about damage. Of several processes,
    only the first opens it."""
    fingerprints = options.fingerprints | {"data": calibration}
    if not launch.first():
        return WorkDir(options.work_dir or options.work_root, "")
    if options.work_dir is not None:
        return open_workdir(options.work_dir, fingerprints, tell)
    return open_workdir(options.work_root / hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16], fingerprints, tell)


def write_files(
    options: ConvertOptions, quantised: Quantised | None, tower: VisionFile | None, stages: Stages, state: str
) -> tuple[list[TensorRecord], list[TensorRecord]]:
    """Write both files (without a vision file for a language model only); they get their final names when both are complete.

    ``tower`` None means the checkpoint's own. Raises UserError if the model's files have changed since ``state`` was computed, since layers
    are read during the run.
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
    """The contents of the text GGUF."""
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
