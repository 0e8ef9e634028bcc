"""``mbq-gguf eval``: compare GGUF files of one model on questions about pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
from rich.console import Console

from mbq_gguf.errors import UsageError
from mbq_gguf.option_groups import THREADS

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("eval", short_help="Measure how much files lose against a reference file.")
@click.argument("reference", type=FILE)
@click.argument("candidates", type=FILE, nargs=-1, required=True)
@click.option(
    "--mmproj",
    type=FILE,
    help="The vision file of all (default: mmproj-REFERENCE beside REFERENCE); a rotated file uses its own mmproj-NAME beside it.",
)
@click.option("--data", type=FILE, help="Questions and answers, a JSONL file as for `convert --calib` (default: the demo's 612 questions).")
@click.option("--questions", type=click.IntRange(min=1), help="Ask this many questions, equally many of each task (default: all).")
@click.option("--text", type=FILE, help="Also compare on this text file, without pictures.")
@click.option("--out", type=FILE, help="Write all figures and answers as JSON.")
@click.option("--html", type=FILE, help="Write the report as one HTML page.")
@click.option("--threads", type=THREADS, help="CPU threads (default: all cores).")
@click.option("--gpu-layers", type=int, default=0, show_default=True, help="Layers on the GPU, -1 for all.")
@click.option(
    "--context", type=click.IntRange(min=512), default=4096, show_default=True, help="Context size in tokens: picture, question and answer."
)
def eval_command(
    reference: Path,
    candidates: tuple[Path, ...],
    mmproj: Path | None,
    data: Path | None,
    questions: int | None,
    text: Path | None,
    out: Path | None,
    html: Path | None,
    threads: int | None,
    gpu_layers: int,
    context: int,
) -> None:
    """Compare CANDIDATES with REFERENCE, GGUF files of one model, on questions about pictures.

    Each file is evaluated twice: teacher-forced along the expected answers, for the KL divergence of its token distributions from the
    reference's, and by greedy decoding, for exact match. The table goes to the terminal; --out and --html write the details.

    If a run with --out or --html is interrupted, the same command resumes it: the results of finished files are kept in a folder beside
    the output, and only REFERENCE is evaluated again.
    """
    from mbq_gguf.evaluate.exact_match import SHIPPED
    from mbq_gguf.evaluate.report import render as render_page
    from mbq_gguf.evaluate.results import Evaluation
    from mbq_gguf.evaluate.run import EvalOptions, evaluate
    from mbq_gguf.evaluate.table import grids, render
    from mbq_gguf.export.atomic import check_output, staged, target
    from mbq_gguf.llama_cpp.paths import check_gpu_layers

    check_gpu_layers(gpu_layers)
    if mmproj is None:
        mmproj = reference.with_name(f"mmproj-{reference.name}")
        if reference.is_file() and not mmproj.is_file():  # a missing REFERENCE is reported first, below
            raise UsageError(f"there is no vision file {mmproj}: put it there, or name it with --mmproj")
    read = [target(path) for path in (reference, *candidates, mmproj, data, text) if path is not None]
    for path in (out, html):
        if path is not None:
            check_output(path)
            if target(path) in read:
                raise UsageError(f"{path} is one of the input files: write to another one")
    if out is not None and html is not None and target(out) == target(html):
        raise UsageError(f"--out and --html are both {out}: give them two names")
    output = out or html
    work = output.with_name(f"{output.name}.work") if output else None
    options = EvalOptions(reference, candidates, mmproj, data or SHIPPED, text, questions, threads, gpu_layers, context, work)
    evaluation = evaluate(options, Console(stderr=True))
    console = Console()
    console.print(render(grids(evaluation), console))
    for path, make in ((out, Evaluation.to_json), (html, render_page)):
        if path is not None:
            with staged(path) as (part,):
                part.write_text(make(evaluation), encoding="utf-8", errors="backslashreplace")
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
