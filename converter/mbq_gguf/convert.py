"""The whole way from a Hugging Face directory to a text GGUF and an mmproj GGUF: check, load, calibrate, equalise, round, write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mbq_gguf import settings as defaults
from mbq_gguf.allocation.plan import plan_table
from mbq_gguf.calibration.dataset import Sample, Turns, fingerprint, load_samples
from mbq_gguf.calibration.magnitudes import Estimator
from mbq_gguf.calibration.token_weights import Kind
from mbq_gguf.code_hash import code_hash
from mbq_gguf.errors import UsageError
from mbq_gguf.export import metadata
from mbq_gguf.export.atomic import check_output, claimed, staged, target
from mbq_gguf.export.checkpoint import check_finite_files, names_of, shapes
from mbq_gguf.export.gguf_writer import MMPROJ_TYPES, TextFile, write_mmproj, write_text
from mbq_gguf.export.injection import TensorRecord
from mbq_gguf.export.progress import Stages, progress_bars
from mbq_gguf.export.rehearsal import rehearse
from mbq_gguf.export.report import ConvertReport, fallback_sentences, nearest_sentences, static_sentences, transform_sentences
from mbq_gguf.export.space import Need, check_room, predict, taken
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.load import check_source
from mbq_gguf.models.prompts import AnswerMask
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise import check_activations, quantise
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
        shutil.rmtree(work_root(options), ignore_errors=True)
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


def check_inputs(options: ConvertOptions) -> list[Path]:
    """Everything that can be refused before any work; returns the checkpoint's weight files."""
    quant_type(options.type)
    quant_type(options.embedding_type)
    check_activations(options.settings)
    if options.mmproj_type not in MMPROJ_TYPES:
        raise UsageError(f"there is no mmproj type {options.mmproj_type}: choose one of {', '.join(MMPROJ_TYPES)}")
    check_device(options.device)
    if options.samples < 1:
        raise UsageError("calibration needs at least one sample: give --samples 1 or more")
    check_source(options.model_dir)
    files = weight_files(options.model_dir)
    check_room(needed(options, files))
    rehearse(options.model_dir, files, options.mmproj_type)
    return files


def needed(options: ConvertOptions, files: Sequence[Path]) -> list[Need]:
    """The bytes that the two files and the finished layers will take, and where; layers that an earlier run finished are there already."""
    layer_bits = options.target_bpw or quant_type(options.type).bits_per_weight
    embedding_bits = quant_type(options.type if options.unquantised else options.embedding_type).bits_per_weight
    named = dict(zip(names_of(files), shapes(files), strict=True))
    sizes = predict(named, layer_bits, embedding_bits, quant_type(options.mmproj_type).bits_per_weight)
    needs = [Need(target(options.out).parent, options.out.name, sizes.text)]
    needs.append(Need(target(options.mmproj).parent, options.mmproj.name, sizes.mmproj))
    if not options.unquantised:
        work = options.work_dir or work_root(options)
        needs.append(Need(work.absolute(), "finished layers", max(sizes.layers - taken(work), 0)))
    return needs


def check_device(name: str) -> None:
    """Raise UsageError where torch cannot compute on the device called ``name``."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"torch cannot compute on {name} ({reason}): give --device cpu, or install a torch for your card") from error


def run_quantisation(options: ConvertOptions, console: Console, bars: Progress, timer: Timer) -> Quantised:
    """Load the model, calibrate, equalise and round."""
    stages = Stages(bars)
    with timer.timed("load"):
        loaded = load(options.model_dir, options.device)
    options = options.with_rotation(loaded)
    samples: list[Sample] = []
    if options.target_bpw or options.method != "rtn" or options.rounding != "nearest" or options.activations == "static":
        if options.calib is None:
            console.print(
                "calibrating with the drawn scenes that ship with mbq-gguf: give --calib with pictures like those you will ask about",
                style="yellow",
                highlight=False,
            )
        with timer.timed("samples"):
            say = partial(console.print, style="yellow", highlight=False, soft_wrap=True)
            samples = load_samples(options.calib, loaded, options.samples, options.seed, options.turns, say)
    calibration = fingerprint(samples) if samples else ""
    work = open_work(options, calibration, lambda sentence: console.print(sentence, style="yellow", highlight=False, soft_wrap=True))
    try:
        result = quantise(loaded, samples, options.settings, work, stages)
    finally:
        if options.work_dir is None and not any(work.path.glob("*.safetensors")):
            shutil.rmtree(work_root(options), ignore_errors=True)  # nothing to go on from
    timer.seconds.update(result.seconds)
    return Quantised(result, calibration, len(samples))


def open_work(options: ConvertOptions, calibration: str, tell: Callable[[str], object]) -> WorkDir:
    """The work directory of this model, these samples, these settings and this code; ``tell`` hears of damage in it."""
    fingerprints = {
        "model": model_fingerprint(options.model_dir),
        "data": calibration,
        "settings": json.dumps(asdict(options.settings), sort_keys=True),
        "code": code_hash("quantise"),
    }
    if options.work_dir is not None:
        return open_workdir(options.work_dir, fingerprints, tell)
    return open_workdir(work_root(options) / hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16], fingerprints, tell)


def work_root(options: ConvertOptions) -> Path:
    """Where runs towards ``options.out`` keep their finished layers."""
    return options.out.with_name(f"{options.out.name}.work")


def model_fingerprint(model_dir: Path) -> str:
    """A hash that changes when a file of the model does: names, sizes and times, since hashing the weights would take minutes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model_dir.iterdir()) if path.is_file()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


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
