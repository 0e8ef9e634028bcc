"""A conversion without its work: everything that can fail early, and what to expect of files, memory and time. Nothing is written.

Sizes come from the very code that writes the files, given the shapes of the quantised weights. Memory and time are measured rates, scaled.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from mbq_gguf.beforehand import check_inputs, check_tower, look_ahead
from mbq_gguf.convert import ConvertOptions, Quantised, text_file
from mbq_gguf.export.atomic import check_output
from mbq_gguf.export.gguf_writer import HEAD, TextFile, VisionFile, measure_mmproj, measure_text
from mbq_gguf.export.report import ConvertReport, duration, megabytes, type_table
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models.load import outline
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.quantise_tower import tower_file, tower_keys
from mbq_gguf.transforms.rotation import file_keys

# Processor seconds of conversions of the reference VLM (106 million weights in layers) by samples and texts, from docs/results.md:
# 32, 96 and 256 samples took 305, 435 and 850 s (993 with another seed), 96 without texts 369 s; the line through them is within 21 %.
REFERENCE_WEIGHTS = 106e6
FIXED, A_SAMPLE, A_TEXT = 158.0, 2.2, 0.83
# Machine B took 752 s of one thread for what that line puts at 435 s, and multiplies 48e9 floats a second on one (measure_rate). Larger
# models have only been scaled, by weights: expect the right order, not the minute.
OPERATIONS = 752 / 435 * 48e9
SLOWER = {"awq": 3.4, "mbq": 3.4}  # the search: 1483 s for 435
A_PASS = 1.4  # of --learn-scales: 2855 s for 435 with four passes
# Peak memory of the same conversions: 2.35, 2.56 and 3.65 GB by samples, 2.11 without texts. This rule gives 2.23, 2.60, 3.52 and 2.14.
PROCESS_BYTES = 1.3e9  # Python, torch, transformers and their buffers
STREAM_BYTES = 10e3  # of a sample or text, for each channel of the hidden state


@dataclass(frozen=True)
class Expected:
    """What a conversion would write and need: sizes in bytes, times in seconds."""

    report: ConvertReport
    text_bytes: int
    mmproj_bytes: int
    memory: float
    seconds: float
    samples: int

    def render(self) -> RenderableType:
        """Files and types as after a conversion, then what it takes."""
        return Group(
            type_table(self.report),
            Text(f"{self.report.out.name} {megabytes(self.text_bytes)}, {self.report.mmproj.name} {megabytes(self.mmproj_bytes)}"),
            Text(f"about {megabytes(round(self.memory))} of memory and {duration(self.seconds)} on this machine as busy as it is now"),
            Text("nothing was written: the same command without --dry-run converts"),
        )


def dry_run(options: ConvertOptions, console: Console) -> Expected:
    """Check what can be checked and tell what to expect; raises UserError and UsageError as ``convert`` does at its start."""
    check_output(options.out)
    check_output(options.mmproj)
    with remote_code(options.trust_remote_code):
        return _dry_run(options, console)


def _dry_run(options: ConvertOptions, console: Console) -> Expected:
    files = check_inputs(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.unquantised:
        model, samples = outline(options.model_dir), 0
    else:
        ahead = look_ahead(options, partial(console.print, style="yellow", highlight=False, soft_wrap=True))
        options, model, samples = ahead.options, ahead.model, len(ahead.drawn)
    weights = sum(linear.weight.numel() for _, linear in model.decoder.linears())
    content = expected_content(options, model, samples)
    with TemporaryDirectory(prefix="mbq-gguf-") as folder:
        scratch = Path(folder)
        text, text_bytes = measure_text(options.model_dir, scratch, content)
        vision, mmproj_bytes = measure_mmproj(options.model_dir, scratch, options.mmproj_type, expected_vision(options, model))
    if options.target_bpw is not None:  # types are chosen by what the samples say: the sum alone is known
        quantised = sum(tensor.data.size for tensor in content.quantised.values())
        text_bytes += round(weights * options.target_bpw / 8) - quantised
    before = sum(file.stat().st_size for file in files)
    report = ConvertReport(options.out, options.mmproj, text, vision, before, [])
    width = model.decoder.embed_tokens.embedding_dim
    memory = PROCESS_BYTES + before + STREAM_BYTES * width * (samples + (options.synthetic if samples else 0))
    return Expected(report, text_bytes, mmproj_bytes, memory, expected_seconds(options, weights, samples), samples)


def expected_content(options: ConvertOptions, model: LoadedModel, samples: int) -> TextFile:
    """The text file with quantised weights of the right types and shapes, which take no memory."""
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
    """The vision file likewise."""
    keys = {} if options.unquantised else file_keys(options.rotate or "none")
    if not options.changes_tower:
        return VisionFile(metadata=keys)
    tower = check_tower(options, model)
    found = tower_file(tower, options.tower_type) if options.tower_type else VisionFile()
    return replace(found, metadata={**found.metadata, **keys, **tower_keys(options.tower_settings(tower), options.rounding)})


def expected_seconds(options: ConvertOptions, weights: int, samples: int) -> float:
    """By the rules above, at the rate that this machine has now."""
    if not samples:
        return 60 * weights / REFERENCE_WEIGHTS / 10  # writing: seconds where the disk keeps up
    units = FIXED + A_SAMPLE * samples + A_TEXT * options.synthetic
    units *= SLOWER.get(options.method, 1.0) + A_PASS * options.learn_scales
    return units * weights / REFERENCE_WEIGHTS * OPERATIONS / measure_rate(options.device)


def measure_rate(device: str, least: float = 0.5) -> float:
    """Floating-point operations a second of float32 products on ``device``, over at least ``least`` seconds."""
    matrix = torch.randn(768, 768, device=device)
    float((matrix @ matrix)[0, 0])  # the first call makes ready
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < least or not done:
        float((matrix @ matrix)[0, 0])  # waits for the device
        done += 1
    return 2 * 768**3 * done / max(taken, time.perf_counter() - start)
