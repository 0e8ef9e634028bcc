"""The whole way from a Hugging Face directory to a text GGUF and an mmproj GGUF: check, load, calibrate, equalise, round, write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mbq_gguf import settings as defaults
from mbq_gguf.allocation.plan import plan_table
from mbq_gguf.beforehand import check_inputs, look_ahead
from mbq_gguf.calibration.dataset import Turns, fingerprint
from mbq_gguf.calibration.magnitudes import Estimator
from mbq_gguf.calibration.token_weights import Kind
from mbq_gguf.code_hash import code_hash
from mbq_gguf.export import metadata
from mbq_gguf.export.atomic import check_output, claimed, staged
from mbq_gguf.export.checkpoint import check_finite_files
from mbq_gguf.export.gguf_writer import TextFile, write_mmproj, write_text
from mbq_gguf.export.injection import TensorRecord
from mbq_gguf.export.progress import Stages, progress_bars
from mbq_gguf.export.report import ConvertReport, fallback_sentences, nearest_sentences, static_sentences, transform_sentences
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.prompts import AnswerMask
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import Activations, Method, QuantiseSettings, Rounding, SearchLoss
from mbq_gguf.timing import Timer
from mbq_gguf.transforms.rotation import Rotate, widest_rotation
from mbq_gguf.workdir import WorkDir, open_workdir

REFERENCE_TYPES = ("BF16", "F16", "F32")  # --type without quantisation: what upstream's converter would write
BASE_TYPE = "BF16"  # matrices of a quantised file that no method touches; checkpoints are BF16 today, so nothing is lost


@dataclass(frozen=True)
class ConvertOptions:
    """What ``mbq-gguf convert`` takes; the defaults are the command's."""

    model_dir: Path
    out: Path
    type: str = QuantiseSettings.type_name
    target_bpw: float | None = None  # a type chosen for each tensor instead, to this many bits a weight of the decoder's matrices
    method: Method = QuantiseSettings.method
    rounding: Rounding = QuantiseSettings.rounding
    calib: Path | None = None  # a JSONL set or a folder of images; None: the set that ships with the demonstration
    samples: int = defaults.SAMPLES
    seed: int = defaults.SEED
    turns: Turns = defaults.TURNS
    device: str = defaults.DEVICE
    threads: int | None = None
    embedding_type: str = defaults.EMBEDDING_TYPE  # of embeddings and output head
    mmproj_type: str = defaults.MMPROJ_TYPE
    synthetic: int = QuantiseSettings.synthetic
    floor: bool = QuantiseSettings.floor  # no layer's ratio below the median over layers
    answer_mask: AnswerMask = QuantiseSettings.answer_mask
    token_weights: Kind = QuantiseSettings.token_weights
    prompt_weight: float = QuantiseSettings.prompt_weight
    activations: Activations = QuantiseSettings.activations
    range_estimator: Estimator = QuantiseSettings.range_estimator
    rotate: Rotate | None = None  # None: all that the model allows for ROTATED_TYPES, else nothing
    search_samples: int | None = QuantiseSettings.search_samples
    search_loss: SearchLoss | None = QuantiseSettings.search_loss
    grouped_o: bool = QuantiseSettings.grouped_o
    clip: bool = QuantiseSettings.clip
    propagate_error: bool = QuantiseSettings.propagate_error
    error_correction: float = QuantiseSettings.error_correction
    refits: int = QuantiseSettings.refits
    learn_scales: int = QuantiseSettings.learn_scales
    trust_remote_code: bool = False  # whether Python code in model_dir may run
    work_dir: Path | None = None  # where finished layers are kept; None: beside out, until out is whole

    @property
    def mmproj(self) -> Path:
        """The second file: vision tower and projector."""
        return self.out.with_name(f"mmproj-{self.out.name}")

    @property
    def settings(self) -> QuantiseSettings:
        """What the converter's core needs of this."""
        shared = {field.name for field in fields(QuantiseSettings)} & {field.name for field in fields(self)}
        chosen = {name: getattr(self, name) for name in shared} | {"rotate": self.rotate or QuantiseSettings.rotate}
        return QuantiseSettings(type_name=quant_type(self.type).name, **chosen)

    def with_rotation(self, loaded: LoadedModel) -> ConvertOptions:
        """The same with the rotation that suits type and model where none was asked for."""
        if self.rotate is not None:
            return self
        gains = quant_type(self.type).name in defaults.ROTATED_TYPES and self.rounding == "gptq" and self.method == "rtn"
        return replace(self, rotate=widest_rotation(loaded) if gains and not self.target_bpw else "none")

    @property
    def work_root(self) -> Path:
        """Where runs towards ``out`` keep their finished layers where no other place is given."""
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def fingerprints(self) -> dict[str, str]:
        """What finished layers depend on beside the samples, by name.

        The model's: names, sizes and times of its files, since hashing the weights would take minutes.
        """
        files = [path for path in sorted(self.model_dir.iterdir()) if path.is_file()]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {
            "model": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
            "settings": json.dumps(asdict(self.settings), sort_keys=True),
            "code": code_hash("quantise"),
        }

    @property
    def calibrates(self) -> bool:
        """Whether samples are needed."""
        return bool(self.target_bpw or self.method != "rtn" or self.rounding != "nearest" or self.activations == "static")

    @property
    def unquantised(self) -> bool:
        """Whether the file is to be what upstream's converter would write."""
        return self.target_bpw is None and quant_type(self.type).name in REFERENCE_TYPES


@dataclass(frozen=True)
class Quantised:
    """The outcome of calibration, equalisation and rounding, with what the file's metadata say of it."""

    result: QuantiseResult
    fingerprint: str
    samples: int


def convert(options: ConvertOptions, console: Console) -> ConvertReport:
    """Write ``options.out`` and the mmproj file beside it, with progress on ``console``.

    Both files appear when both are whole; a run that was stopped goes on after its last finished layer. Raises UserError or UsageError
    for everything a user can mend: directory, architecture, weights, images, types, and output paths and disks.
    """
    check_output(options.out)
    check_output(options.mmproj)
    shared = [] if options.work_dir is None else [options.work_dir]
    with claimed(options.out, options.mmproj, *shared), remote_code(options.trust_remote_code):
        return _convert(options, console)


def _convert(options: ConvertOptions, console: Console) -> ConvertReport:
    files = check_inputs(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    timer = Timer()
    with progress_bars(console) as bars:
        quantised: Quantised | None = None
        if options.unquantised:
            with timer.timed("check"):
                check_finite_files(files)
        else:
            quantised = run_quantisation(options, console, bars, timer)
        with timer.timed("write"):
            text, vision = write_files(options, quantised, bars)
    weights = {} if quantised is None else {name: (w.type_name, w.columns) for name, w in quantised.result.quantised.items()}
    plan = None if quantised is None else quantised.result.plan
    sentences = fallback_sentences(quant_type(options.type).name, {} if plan else weights, text)
    if options.rounding == "gptq":
        sentences += nearest_sentences(name for name, _ in weights.values())
    if quantised and quantised.result.hadamard:
        sentences += transform_sentences(name for name, _ in weights.values())
    if quantised:
        sentences += static_sentences(quantised.result.facts_of("metadata"))
    allocation = plan_table(plan, quantised.result.losses) if quantised and plan else None
    if options.work_dir is None:
        shutil.rmtree(options.work_root, ignore_errors=True)
    before = sum(file.stat().st_size for file in files)
    return ConvertReport(
        options.out, options.mmproj, text, vision, before, sentences, timer.seconds, allocation, calibrated(options, quantised)
    )


def calibrated(options: ConvertOptions, quantised: Quantised | None) -> str:
    """How much a file was calibrated on, in a sentence; "" where it was not."""
    if quantised is None or not quantised.samples:
        return ""
    beside = f", {options.synthetic} texts of the model's own and {options.synthetic // 2} made pictures" if options.synthetic else ""
    asked = f" ({options.samples} were asked for)" if quantised.samples < options.samples else ""
    return f"calibrated on {quantised.samples} samples{asked} of {options.calib or 'the drawn scenes of mbq-gguf'}{beside}"


def run_quantisation(options: ConvertOptions, console: Console, bars: Progress, timer: Timer) -> Quantised:
    """Look at all that can be refused, load the model, calibrate, equalise and round."""
    stages, say = Stages(bars), partial(console.print, style="yellow", highlight=False, soft_wrap=True)
    with timer.timed("check"):
        ahead = look_ahead(options, say)
    options = ahead.options
    with timer.timed("load"):
        loaded = load(options.model_dir, options.device, prompts=ahead.model.prompts)
    with timer.timed("samples"):
        samples = ahead.drawn.answered(loaded, say) if ahead.drawn else []
    calibration = fingerprint(samples) if samples else ""
    work = open_work(options, calibration, say)
    try:
        result = quantise(loaded, samples, options.settings, work, stages)
    finally:
        if options.work_dir is None and not any(work.path.glob("*.safetensors")):
            shutil.rmtree(options.work_root, ignore_errors=True)  # nothing to go on from
    timer.seconds.update(result.seconds)
    return Quantised(result, calibration, len(samples))


def open_work(options: ConvertOptions, calibration: str, tell: Callable[[str], object]) -> WorkDir:
    """The work directory of this model, these samples, these settings and this code; ``tell`` hears of damage in it."""
    fingerprints = options.fingerprints | {"data": calibration}
    if options.work_dir is not None:
        return open_workdir(options.work_dir, fingerprints, tell)
    return open_workdir(options.work_root / hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16], fingerprints, tell)


def write_files(options: ConvertOptions, quantised: Quantised | None, bars: Progress) -> tuple[list[TensorRecord], list[TensorRecord]]:
    """Both files, under their names when both are whole."""
    stages = Stages(bars)
    with staged(options.mmproj, options.out) as (mmproj_part, text_part):
        vision = write_mmproj(
            options.model_dir,
            mmproj_part,
            options.mmproj_type,
            quantised.result.tensors_of("vision") if quantised else {},
            quantised.result.facts_of("vision") if quantised else {},
            stages.counter("write mmproj"),
        )
        text = write_text(options.model_dir, text_part, text_file(options, quantised), stages.counter("write GGUF"))
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
        synthetic=options.synthetic if quantised.samples else 0,
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
