"""``--dry-run``: run the early checks of a conversion and estimate file sizes, memory and time, without writing anything.

Sizes come from the code that writes the files, given the shapes of the quantised weights. Memory and time follow from shapes and measured
rates (cost.py, memory_estimate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from mbq_gguf import launch
from mbq_gguf.calibration.dataset import FREE_ANSWER_TOKENS, FREE_QUESTION, Drawn
from mbq_gguf.convert import ConvertOptions, Quantised, host_limit, text_file
from mbq_gguf.cost import CARD, Speed, Work, rates_at, stage_seconds, work_of
from mbq_gguf.export.atomic import check_gguf_output
from mbq_gguf.export.gguf_writer import HEAD, TextFile, VisionFile, measure_mmproj, measure_text
from mbq_gguf.export.report import ConvertReport, duration, megabytes, type_table
from mbq_gguf.export.tower_file import tower_file
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.memory import available, process_bytes
from mbq_gguf.memory_estimate import Memory, estimate_memory, suggest_options
from mbq_gguf.models.language_only import language_only_mode
from mbq_gguf.models.load import load_meta
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.preflight import check_inputs, check_tower, run_preflight
from mbq_gguf.quantise_tower import tower_keys
from mbq_gguf.rounding.kernels import kernels_for
from mbq_gguf.transforms.rotation import file_keys

SAMPLED = 8  # samples that are encoded to estimate the length of one


@dataclass(frozen=True)
class Expected:
    """What a conversion would write and need; sizes in bytes, times in seconds."""

    report: ConvertReport
    text_bytes: int
    mmproj_bytes: int
    memory: Memory
    too_large: str  # a sentence, if that much memory is not free
    seconds: float
    samples: int

    def render(self) -> RenderableType:
        """Files and types as after a conversion, then memory and time."""
        card = f", {megabytes(round(self.memory.card))} of GPU memory" if self.memory.card else ""
        disk = f", {megabytes(round(self.memory.disk))} of disk beside the finished layers" if self.memory.disk else ""
        vision = f", {self.report.mmproj.name} {megabytes(self.mmproj_bytes)}" if self.report.mmproj else ""
        each = f" for each of {launch.count()} processes" if launch.count() > 1 else ""
        needed = f"about {megabytes(round(self.memory.host))} of memory{card}{disk}{each} and {duration(self.seconds)}"
        return Group(
            type_table(self.report),
            Text(f"with metadata and tokenizer: {self.report.out.name} {megabytes(self.text_bytes)}{vision}"),
            Text(f"{needed} on this machine at its current load"),
            *([Text(self.too_large, style="bold red")] if self.too_large else []),
            Text("nothing was written: the same command without --dry-run converts"),
        )


def dry_run(options: ConvertOptions, console: Console) -> Expected:
    """Run the early checks and estimate the rest; raises UserError and UsageError as ``convert`` does at its start."""
    check_gguf_output(options.out)
    check_gguf_output(options.mmproj)
    with remote_code(options.trust_remote_code), language_only_mode(options.language_model_only):
        return _dry_run(options, console)


def _dry_run(options: ConvertOptions, console: Console) -> Expected:
    files = check_inputs(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.unquantised:
        model, samples = load_meta(options.model_dir), 0
    else:
        ahead = run_preflight(options, partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True))
        options, model, samples = ahead.options, ahead.model, len(ahead.drawn)
    weights = sum(linear.weight.numel() for _, linear in model.decoder.linears())
    content = expected_content(options, model, samples)
    with TemporaryDirectory(prefix="mbq-gguf-") as folder:
        scratch = Path(folder)
        text, text_bytes = measure_text(options.model_dir, scratch, content)
        vision, mmproj_bytes = (
            ([], 0)
            if options.language_model_only
            else measure_mmproj(options.model_dir, scratch, options.mmproj_type, expected_vision(options, model))
        )
    if options.target_bpw is not None:  # types are chosen by what the samples say: the sum alone is known
        quantised = sum(tensor.data.size for tensor in content.quantised.values())
        text_bytes += round(weights * options.target_bpw / 8) - quantised
    before = sum(file.stat().st_size for file in files)
    report = ConvertReport(options.out, None if options.language_model_only else options.mmproj, text, vision, before, [])
    drawn = None if options.unquantised else ahead.drawn
    work = work_of(
        model,
        checkpoint=before,
        files=text_bytes + mmproj_bytes,
        samples=samples,
        sample_tokens=sample_tokens(model, drawn) if drawn else 0.0,
        texts=options.synthetic if samples or options.language_model_only else 0,
        on_card=options.device != "cpu",
    )
    needed, too_large = expected_memory(options, work)
    return Expected(report, text_bytes, mmproj_bytes, needed, too_large, expected_seconds(options, work), samples)


def sample_tokens(model: LoadedModel, drawn: Drawn) -> float:
    """Mean number of tokens of the first few samples; for pictures without answers, a long answer is assumed."""
    found = [len(model.prompts.encode(sample.image, list(sample.turns)).ids) for sample in drawn.samples[:SAMPLED]]
    found += [len(model.prompts.encode(image, [(FREE_QUESTION, "")]).ids) + FREE_ANSWER_TOKENS for image in drawn.pictures[:SAMPLED]]
    return sum(found) / len(found)


def expected_content(options: ConvertOptions, model: LoadedModel, samples: int) -> TextFile:
    """The text file's contents, with quantised weights of the right types and shapes that take no memory."""
    if options.unquantised:
        return text_file(options, None)
    quantised = {}
    for name, linear in model.decoder.linears():
        rows, columns = linear.weight.shape
        chosen = quant_type_for(options.type, columns)
        quantised[f"{name}.weight"] = QuantisedTensor(chosen.name, np.broadcast_to(np.uint8(0), (rows, chosen.row_bytes(columns))), columns)
    head = model.decoder.head.weight
    untied = {HEAD: torch.zeros(()).expand(head.shape)} if options.rotate != "none" else {}
    result = QuantiseResult()
    for key, value in file_keys(options.rotate or "none").items():
        result.put("metadata", key, value)
    content = text_file(options, Quantised(result, "0" * 64 if samples else "", samples))
    return replace(content, quantised=quantised, replaced=untied)


def expected_vision(options: ConvertOptions, model: LoadedModel) -> VisionFile:
    """The same for the vision file."""
    keys = {} if options.unquantised else file_keys(options.rotate or "none")
    if not options.changes_tower:
        return VisionFile(metadata=keys)
    tower = check_tower(options, model)
    found = tower_file(tower, options.tower_type, options.tower_activations) if options.tower_type else VisionFile()
    return replace(found, metadata={**found.metadata, **keys, **tower_keys(options.tower_settings(tower), options.rounding)})


def expected_memory(options: ConvertOptions, work: Work) -> tuple[Memory, str]:
    """The memory that the conversion needs, and a sentence with options that need less if that much is not free, else ""."""
    device = torch.device(options.device)
    card = 0.0 if device.type == "cpu" else float(available(device))
    host = process_bytes() + available(torch.device("cpu")) / launch.neighbours()
    free, share = Memory(host, card), float(host_limit(options))
    needed = estimate_memory(work, options.device, free, share, options.settings)
    if needed.fits(free):
        return needed, ""
    where = "memory" if needed.host > free.host else "GPU memory"
    wanted, there = (needed.host, free.host) if needed.host > free.host else (needed.card, free.card)
    way = suggest_options(work, options.device, free, share, options.settings)
    todo = f"give {way}, which would fit" if way else "end other programs, or use a machine with more"
    return needed, f"this will not fit: {megabytes(round(wanted))} of {where} are needed and {megabytes(round(there))} are free: {todo}"


def expected_seconds(options: ConvertOptions, work: Work) -> float:
    """The time of all stages at this machine's current speed."""
    searched = options.method in ("awq", "mbq")
    rates = rates_at(measure_speed(), kernels_for(torch.empty(0)) is not None) if options.device == "cpu" else CARD
    if not work.tokens:
        return work.weights * rates.nearest + stage_seconds(work, rates)["write"]
    processes = 1 if options.device == "cpu" else launch.count()  # on a CPU, one already uses all cores
    return sum(stage_seconds(work, rates, searched, options.learn_scales, processes).values())


def measure_speed() -> Speed:
    """Measure this CPU's speed under its current load; takes a second."""
    matrix, groups = torch.randn(768, 768), torch.randn(256, 64)
    products = _per_second(lambda: matrix @ matrix)
    small = _per_second(lambda: torch.mul(groups, groups).add_(groups).square_().sum(dim=1))
    return Speed(2 * 768**3 * products, small, torch.get_num_threads())


def _per_second(operation: Callable[[], object], least: float = 0.5) -> float:
    """How often ``operation`` runs per second, measured over ``least`` seconds."""
    operation()  # warm-up
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < least or not done:
        operation()
        done += 1
    return done / taken
