"""Compares several GGUF files of one model on the same questions; the first is the reference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mbq_cbind.clipping import Clipping
from mbq_cbind.model import Model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbq_gguf.errors import UsageError, error_context
from mbq_gguf.evaluate.exact_match import check_questions, load_questions, stratified
from mbq_gguf.evaluate.finished import Finished, identity
from mbq_gguf.evaluate.kld import Store
from mbq_gguf.evaluate.layers import WeightFile, layer_bits, layers
from mbq_gguf.evaluate.measure import TEXT_CHUNKS, Evaluator
from mbq_gguf.evaluate.results import Asked, Evaluation, FileResult, Layers, short_names
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_specials import file_tokens
from mbq_gguf.llama_cpp.bindings import bind
from mbq_gguf.picture import open_picture

VISION = "clip"  # general.architecture of a vision file


@dataclass(frozen=True)
class EvalOptions:
    """What to compare, and on which data. ``text`` is a file of plain text, ``count`` the number of questions to ask (None: all).

    ``work`` is a folder for the results of finished files, from which an interrupted run resumes; only the reference is evaluated again.
    """

    reference: Path
    candidates: Sequence[Path]
    mmproj: Path
    data: Path
    text: Path | None = None
    count: int | None = None
    threads: int | None = None
    gpu_layers: int = 0
    context: int = 4096
    work: Path | None = None


def evaluate(options: EvalOptions, console: Console | None = None) -> Evaluation:
    """Evaluate every file and compare. Raises UserError or UsageError if a file, a picture or the set of questions is unusable."""
    questions = load_questions(options.data, unanswered=True)
    if options.count is not None:
        questions = stratified(questions, options.count)
    sizes: dict[Path, tuple[int, int]] = {}
    for question in questions:  # check early, before hours of work
        if question.image not in sizes:
            with error_context(question.place):
                sizes[question.image] = open_picture(question.image).size
    files = [options.reference, *options.candidates]
    bind()
    names = short_names([path.absolute() for path in files])
    weights = [WeightFile(path, read_header(path)) for path in files]
    check_questions(questions, options.reference)
    text = _read(options.text) if options.text else None
    parts = [vision_part(file, options.mmproj) for file in weights]
    check_fit(weights, parts)
    asks = [(str(q.image), q.question, q.expected) for q in questions]
    finished = Finished(options.work, [identity(options.reference), identity(parts[0]), asks, text, options.context, options.gpu_layers])
    with TemporaryDirectory(prefix="mbq-gguf-eval-") as folder, _progress(console) as progress:
        examiner = Evaluator(questions, text, Store(Path(folder)))
        bars = [progress.add_task(name, total=len(questions) + (TEXT_CHUNKS if text else 0), start=False) for name in names]
        results = []
        for name, file, part, bar in zip(names, weights, parts, bars, strict=True):
            reference = file is weights[0]
            known = None if reference else finished.load(file.path, part)
            if known is not None:
                progress.update(bar, total=len(questions), completed=len(questions))
                results.append(replace(known, name=name))
                continue
            found = layers(file, None if reference else weights[0])
            examiner.pictures = f"part{parts.index(part)}"
            results.append(_examine(examiner, options, name, file, part, found, sizes, progress, bar))
            if not reference:
                finished.save(file.path, part, results[-1])
    asked = [Asked(str(q.image), q.question, q.expected, q.task) for q in examiner.questions]
    return Evaluation(str(options.data), str(options.mmproj), str(options.text) if options.text else None, asked, results)


def vision_part(file: WeightFile, shared: Path) -> Path:
    """The mmproj file to use with ``file``: ``shared``, or the one beside it if ``file`` is rotated, since its vision file is rotated too.

    Raises UsageError if that one is missing.
    """
    if "mbq.rotate" not in file.header.metadata:
        return shared
    own = file.path.with_name(f"mmproj-{file.path.name}")
    if not own.is_file():
        raise UsageError(f"{file.path.name} is rotated and needs its own vision file {own}, which is missing: put it there")
    return own


def check_fit(files: Sequence[WeightFile], parts: Sequence[Path]) -> None:
    """Raise UsageError if one of ``files`` is not a language model or has another tokeniser than the first, or one of ``parts`` is not a
    vision file."""
    for file in files:
        if file.header.metadata.get("general.architecture") == VISION:
            raise UsageError(f"{file.path} is a vision file: give it with --mmproj, and the language model's file in its place")
    for part in set(parts):
        if read_header(part).metadata.get("general.architecture") != VISION:
            raise UsageError(f"{part} is not a vision file: give the mmproj file that was made with the model")
    tokens = {path: file_tokens(path) for path in {file.path for file in files}}
    for file in files[1:]:
        if tokens[file.path] != tokens[files[0].path]:
            raise UsageError(f"{file.path} has another tokeniser than {files[0].path}: compare files that were made from one model")


def _examine(
    examiner: Evaluator,
    options: EvalOptions,
    name: str,
    file: WeightFile,
    mmproj: Path,
    found: Layers,
    sizes: Mapping[Path, tuple[int, int]],
    progress: Progress,
    bar: TaskID,
) -> FileResult:
    started = time.monotonic()
    progress.start_task(bar)

    def advance() -> None:
        progress.advance(bar)

    clipping = Clipping() if "mbq.act.version" in file.header.metadata else None
    opened = Model(file.path, mmproj, threads=options.threads, gpu_layers=options.gpu_layers, context=options.context, clipping=clipping)
    with opened as model:
        examiner.check_room(model, options.context, sizes)
        chunks = examiner.chunks(model)
        progress.update(bar, total=len(examiner.questions) + len(chunks))
        answers = examiner.answers(model, advance)
        clipped = clipping.shares() if clipping else {}
        text = examiner.text(model, chunks, advance)
        if text and clipping:
            text = replace(text, clipped=clipping.shares())
    tensors = file.header.tensors
    return FileResult(
        name=name,
        path=str(file.path),
        file_bytes=file.path.stat().st_size,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / max(sum(tensor.elements for tensor in tensors), 1),
        layer_bits_per_weight=layer_bits(file),
        seconds=time.monotonic() - started,
        answers=answers,
        text=text,
        layers=found,
        clipped=clipped,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({error}): give a file of plain text in UTF-8") from error


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(stderr=True))
