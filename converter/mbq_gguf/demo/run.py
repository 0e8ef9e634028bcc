"""The demonstration: build, assemble, convert, and three questions about pictures to the patched llama-server.

What it makes lies in one directory and in the user's cache, and is used again for as long as it is up to date.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mbq_gguf
from mbq_gguf.calibration.dataset import SHIPPED as CALIBRATION
from mbq_gguf.code_hash import code_hash
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.demo.assemble import WEIGHTS, assemble
from mbq_gguf.evaluate.exact_match import CONTEXT, MAX_TOKENS, SHIPPED, Question, load_questions
from mbq_gguf.llama_cpp.build import build
from mbq_gguf.llama_cpp.paths import source_dir
from mbq_gguf.llama_cpp.server import LlamaServer

TASKS = ("digits", "leftmost", "chart_sum")  # the first question of each in the shipped set is asked


@dataclass(frozen=True)
class Converted:
    """The GGUF files of a language model and its vision tower."""

    text: Path
    mmproj: Path


def run_demo(console: Console, directory: Path) -> None:
    """Run the whole demo; ``directory`` keeps the model and the GGUF files (700 MB). Raises UserError if a step fails."""
    console.rule("1 of 4: the patched llama.cpp")
    if os.environ.get("MBQ_GGUF_LLAMA_CPP"):
        console.print(f"MBQ_GGUF_LLAMA_CPP names {source_dir()}", highlight=False, soft_wrap=True)
    else:
        build(console=console)
    console.rule("2 of 4: the reference VLM, as a Hugging Face model")
    with console.status("assembling it from SmolLM2-135M-Instruct and the data that ship with the project"):
        model = assemble(directory / "reference-vlm")
    console.print(model, highlight=False, soft_wrap=True)
    console.rule("3 of 4: to GGUF")
    before = converted(model, directory / "reference-vlm-BF16.gguf", "BF16", console)
    after = converted(model, directory / f"reference-vlm-{ConvertOptions.type}.gguf", ConvertOptions.type, console)
    console.rule("4 of 4: questions about pictures, through the OpenAI-compatible API")
    questions = demo_questions()
    given = {name: answers(files, questions, console) for name, files in (("BF16", before), (ConvertOptions.type, after))}
    console.print(comparison(questions, given))
    console.print(sizes(model, before, after))
    program = str(Path(sys.executable).with_name("mbq-gguf"))  # `make demo` leaves it in .venv/bin, which is not on the path
    for command in (["ask", str(after.text), str(questions[0].image), questions[0].question], ["serve", str(after.text)]):
        console.print(f"to go on: {shlex.join([program, *command])}", markup=False, highlight=False, soft_wrap=True)


def converted(model: Path, out: Path, type_name: str, console: Console) -> Converted:
    """Convert ``model`` to ``out`` with type ``type_name``, and its vision tower; reuses files from an earlier identical call."""
    options = ConvertOptions(model, out, type=type_name)
    files = Converted(options.out, options.mmproj)
    stamp, wanted = out.with_suffix(".made-by"), fingerprint(model, type_name)
    if files.text.is_file() and files.mmproj.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        console.print(f"{out.name} is there already", highlight=False, soft_wrap=True)
        return files
    stamp.unlink(missing_ok=True)
    convert(options, console)
    stamp.write_text(wanted, encoding="utf-8")
    return files


def fingerprint(model: Path, type_name: str) -> str:
    """A hash of everything that a converted file depends on: model, type, calibration set, and the converter's code."""
    digest = hashlib.sha256(f"{mbq_gguf.__version__} {type_name} {code_hash('convert')}".encode())
    folder = CALIBRATION.parent
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)} {file_hash(file)}".encode())
    digest.update(file_hash(model / WEIGHTS).encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_questions() -> list[Question]:
    """The questions to ask, one for each of TASKS."""
    shipped = load_questions(SHIPPED)
    return [next(question for question in shipped if question.task == task) for task in TASKS]


def answers(files: Converted, questions: list[Question], console: Console) -> list[str]:
    """The answers of `files` to `questions`."""
    given = []
    starting = f"starting llama-server with {files.text.name}"
    with console.status(starting) as status, LlamaServer(files.text, files.mmproj, ctx=CONTEXT) as server:
        for question in questions:
            status.update(f"{files.text.name}, {question.image.name}: {question.question}")
            given.append(server.ask(question.image, question.question, MAX_TOKENS).text.strip())
    return given


def comparison(questions: list[Question], given: dict[str, list[str]]) -> Table:
    """A table of the questions with the expected answers and each file's answers; wrong ones are marked."""
    table = Table("picture", "question", "expected", *given, title="what the model sees, before and after")
    for number, question in enumerate(questions):
        said = [answers[number] for answers in given.values()]
        marked = [escape(answer) if answer == question.expected else f"[red]{escape(answer)} (wrong)[/]" for answer in said]
        table.add_row(question.image.name, question.question, question.expected, *marked)
    return table


def sizes(model: Path, before: Converted, after: Converted) -> Table:
    """A table of the files' sizes."""
    table = Table("file", "MB", title="file sizes, before and after")
    for path in (model / WEIGHTS, before.text, after.text, before.mmproj, after.mmproj):
        table.add_row(path.name, f"{path.stat().st_size / 1e6:.1f}")
    table.columns[1].justify = "right"
    return table
