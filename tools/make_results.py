#!/usr/bin/env python3
"""Updates the quality table of docs/results.md: converts the reference VLM every way, asks the patched llama-server, counts right answers.

    python tools/make_results.py                       every row that docs/results/quality.json does not have yet
    python tools/make_results.py --only BF16 --again   one row, once more
    python tools/make_results.py --questions 306       half of the questions, in half of the time

Each row is saved when it is finished, so an interrupted run continues; a row with fewer questions than now is measured again. The rows are
those of variants.py. The files of its STEPS are made and measured, but not asked: make_divergence.py compares them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import click
from mbq_gguf.demo.assemble import assemble
from mbq_gguf.errors import UserError
from mbq_gguf.evaluate.exact_match import SHIPPED, ExactMatch, Question, Score, exact_match, load_questions, stratified
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.llama_cpp.cache import cache_root
from mbq_gguf.llama_cpp.locks import termination_as_exit
from mbq_gguf.llama_cpp.paths import find_program
from rich.console import Console
from variants import REFERENCE, THREADS, VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
TABLE = ROOT / "docs" / "results" / "quality.json"
BEGIN, END = "<!-- quality table: tools/make_results.py -->", "<!-- end of quality table -->"
ENVIRONMENT = dict(os.environ)
MAKERS = ("converter", "ggml_patch", ":(exclude)ggml_patch/src/ggml/src/ggml-cuda")  # the code that the figures depend on


@dataclass(frozen=True)
class Row:
    """A finished row."""

    name: str
    command: str  # with the folders left out
    commit: str
    date: str
    file_bytes: int
    bits_layers: float  # bits per weight over the decoder layers' matrices
    bits_all: float  # over all tensors of the file, embeddings and output head included
    seconds: float  # processor time to make the file, all threads: wall time means little beside other work
    peak_bytes: int  # resident memory of the process that made it, at most
    ask_seconds: float
    scores: dict[str, tuple[int, int]]  # task: right, asked; none if the server was not asked
    given: list[str]  # the answers, in the order of the questions

    @property
    def total(self) -> Score:
        return Score(sum(asked for _, asked in self.scores.values()), sum(right for right, _ in self.scores.values()))


@dataclass(frozen=True)
class Made:
    """The cost of making a file."""

    seconds: float  # processor time, user and system
    peak_bytes: int


def run_measured(command: list[str], log: Path) -> Made:
    """Run ``command`` with its output in ``log``. Raises UserError with the log's last line if it fails."""
    program = [sys.executable, "-m", "mbq_gguf"] if command[0] == "mbq-gguf" else [str(find_program(command[0]))]
    with log.open("wb") as output, termination_as_exit():
        process = subprocess.Popen([*program, *command[1:]], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone, in KiB on Linux
        except BaseException:
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"`{shlex.join(command)}` ended with {process.returncode} ({last[0]}): see all of it in {log}")
    return Made(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def bits_per_weight(path: Path) -> tuple[float, float]:
    """Bits per weight in the matrices of the decoder layers, and in all tensors of the file."""
    tensors = import_gguf().GGUFReader(path).tensors
    layers = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return tuple(8 * sum(int(t.n_bytes) for t in some) / sum(int(t.n_elements) for t in some) for some in (layers, tensors))  # type: ignore[return-value]


def make_row(variant: Variant, folder: Path, model: Path, questions: list[Question], console: Console) -> Row:
    """Make the file, and ask the questions unless it is a step. File and answers stay in ``folder``."""
    command, path = variant.command(folder, model), folder / variant.file_name
    console.print(f"[bold]{variant.name}[/]: {shlex.join(command)}", highlight=False, soft_wrap=True)
    shutil.rmtree(folder / f"{path.name}.work", ignore_errors=True)  # a run that was stopped must not shorten this one
    made = run_measured(command, path.with_suffix(".log"))
    scores, given, ask_seconds = {}, [], 0.0
    if variant.asked:
        result = ask(path, folder, questions, console)
        scores = {task: (score.right, score.asked) for task, score in result.tasks.items()}
        given, ask_seconds = [a.given for a in result.answers], result.seconds
    layers, everything = bits_per_weight(path)
    shown = shlex.join(command).replace(f"{folder}/", "").replace(str(model), "reference-vlm")
    return Row(
        name=variant.name, command=shown, commit=commit(), date=date.today().isoformat(), file_bytes=path.stat().st_size,
        bits_layers=layers, bits_all=everything, seconds=made.seconds, peak_bytes=made.peak_bytes, ask_seconds=ask_seconds,
        scores=scores, given=given,
    )  # fmt: skip


def ask(path: Path, folder: Path, questions: list[Question], console: Console) -> ExactMatch:
    """The answers of ``path``, served by the patched llama-server; also saved beside it."""
    # Spinning threads take the cores from each other when anything else runs: without spinning 17 questions take 10.4 s instead of 13.3.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    own = folder / f"mmproj-{path.name}"  # a rotated language model reads image features in its own basis
    mmproj = own if own.is_file() else folder / f"mmproj-{REFERENCE}.gguf"
    result = exact_match(path, mmproj, questions, threads=THREADS, console=console)
    path.with_suffix(".answers.json").write_text(result.to_json(), encoding="utf-8")
    return result


def commit() -> str:
    """The commit of the code in use, with a plus if MAKERS have uncommitted changes."""
    head, changes = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", *MAKERS])
    )
    return head + ("+" if changes else "")


def load_rows(path: Path) -> dict[str, Row]:
    """The rows finished so far, by name."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {row["name"]: Row(**{**row, "scores": {task: tuple(pair) for task, pair in row["scores"].items()}}) for row in rows}


def save_rows(path: Path, rows: dict[str, Row]) -> None:
    """Write one row per line, in the order of VARIANTS, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in ordered(rows))
    draft = path.with_suffix(".tmp")
    draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(draft, path)


def ordered(rows: dict[str, Row]) -> list[Row]:
    """Rows in the order of VARIANTS; rows of removed variants come last."""
    names = [variant.name for variant in VARIANTS]
    return sorted(rows.values(), key=lambda row: names.index(row.name) if row.name in names else len(names))


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first column is text; the others are figures."""
    titles = list(head)
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, rule, *lines])


def render(rows: dict[str, Row]) -> str:
    """The section between the markers: how it was measured, and the table."""
    done = [row for row in ordered(rows) if row.scores]
    reference = rows.get(REFERENCE)
    main = [
        [
            row.name,
            str(row.total.asked),
            f"{row.total.share:.3f} ± {row.total.standard_error:.3f}",
            f"{row.total.share / reference.total.share:.3f}" if reference else "",
            f"{row.bits_layers:.2f}",
            f"{row.bits_all:.2f}",
            f"{row.file_bytes / 1e6:.1f}",
            f"{row.seconds:.0f}",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in done
    ]
    sizes = ["bits per weight, layers", "all tensors", "MB"]
    titles = [
        "file",
        "questions",
        "exact match",
        "of BF16",
        *sizes,
        "CPU seconds to make",
        "peak GB",
    ]
    parts = [
        f"Measured on {machine()}, with `python tools/make_results.py --questions {min(row.total.asked for row in done)}`:",
        f"Questions, the same number of every task, through the patched `llama-server`, {THREADS} threads, one at a time.",
        "± is the binomial standard error. The vision tower is F16 in every row (20 MB, not counted in MB).",
        "",
        table(titles, main),
        "",
        f"Right answers by task, every answer, and the command, commit and date of each file: [{TABLE.name}](results/{TABLE.name}).",
    ]
    return "\n".join(parts)


def machine() -> str:
    """A description of the machine: processor, cores, memory, system."""
    cpuinfo, meminfo = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", meminfo)
    assert memory is not None
    name = model.group(1) if model else platform.machine()
    wide = " with AVX-512" if "avx512f" in cpuinfo else " with AVX2" if "avx2" in cpuinfo else ""
    return f"{name}{wide}, {os.cpu_count()} cores, {int(memory.group(1)) / 2**20:.0f} GiB, Linux {platform.machine()}"


def write_page(rows: dict[str, Row]) -> None:
    """Put the rendered rows between the markers of docs/results.md. Raises UserError if the markers are missing."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE} has lost its markers: put `{BEGIN}` and `{END}` back where the table goes")
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(rows)}\n\n{END}{after}", encoding="utf-8")


@click.command()
@click.option("--questions", "count", type=click.IntRange(min=1), help="Number of questions, the same for each task (default: all 612).")
@click.option("--only", multiple=True, type=click.Choice([v.name for v in VARIANTS]), help="Only this row; may be given several times.")
@click.option("--again", is_flag=True, help="Make finished rows again.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the GGUF files (default: the user cache).")
def main(count: int | None, only: tuple[str, ...], again: bool, out: Path | None) -> None:
    """Update the quality table of docs/results.md."""
    console = Console()
    folder = (out or cache_root() / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    questions = load_questions(SHIPPED)
    asked = questions if count is None else stratified(questions, count)
    model = folder / "reference-vlm"
    try:
        assemble(model)
        rows = load_rows(TABLE)
        finished = {v.name for v in VARIANTS if v.name in rows and rows[v.name].total.asked >= len(asked) * v.asked and not again}
        wanted = [v for v in VARIANTS if v.name not in finished and (not only or v.name in only)]
        if not all((folder / name).is_file() for name in (f"{REFERENCE}.gguf", f"mmproj-{REFERENCE}.gguf")):
            run_measured(VARIANTS[0].command(folder, model), folder / f"{REFERENCE}.log")  # every other row needs them
        for variant in wanted:
            row = make_row(variant, folder, model, asked, console)
            rows = load_rows(TABLE) | {variant.name: row}  # another run may have made others meanwhile
            save_rows(TABLE, rows)
            write_page(rows)
            console.print(f"  {row.seconds:.0f} s of processor time" + (f", {row.total.share:.3f}" if row.scores else ""), highlight=False)
    except UserError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    console.print(render(rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
