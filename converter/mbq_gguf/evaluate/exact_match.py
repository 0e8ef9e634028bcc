"""Exact match: the share of questions about pictures that a GGUF model answers word for word through llama-server.

Uses greedy decoding; an answer is right if it equals the expected text after stripping white space. Every turn of the data set is asked
separately, in a new conversation with its picture.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbq_gguf.conversations import read_scenes
from mbq_gguf.export.gguf_specials import file_special_tokens
from mbq_gguf.llama_cpp.server import LlamaServer
from mbq_gguf.special_tokens import check_text

SHIPPED = Path(__file__).parent.parent / "demo" / "data" / "eval" / "eval.jsonl"
CONTEXT = 512  # tokens that a question may take, including vision tokens and the answer
MAX_TOKENS = 48  # twice the longest expected answer of the shipped set (23 tokens)


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    image: Path
    question: str
    expected: str  # "" if no answer is known
    task: str
    place: str = field(default="", compare=False)  # file and line, for error messages


@dataclass(frozen=True)
class GradedAnswer:
    """A question and its answer; ``given`` is stripped of white space."""

    image: str  # file name
    task: str
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected text, exactly."""
        return self.given == self.expected.strip()


@dataclass(frozen=True)
class Score:
    """The number of questions and of right answers."""

    asked: int
    right: int

    @property
    def share(self) -> float:
        """Right answers over questions, 0 to 1."""
        return self.right / self.asked

    @property
    def standard_error(self) -> float:
        """The binomial standard error of the share, sqrt(p (1 - p) / n). It is 0 if all or no answers are right, which underestimates
        it."""
        return sqrt(self.share * (1 - self.share) / self.asked)


@dataclass(frozen=True)
class ExactMatch:
    """One model's answers to one set of questions."""

    model: str  # file name
    seconds: float  # from the first question to the last answer, without the server's start
    answers: list[GradedAnswer]

    @property
    def total(self) -> Score:
        """Over all questions."""
        return _score(self.answers)

    @property
    def tasks(self) -> dict[str, Score]:
        """Per task, in the order of their names."""
        return {task: _score(a for a in self.answers if a.task == task) for task in sorted({a.task for a in self.answers})}

    def to_json(self) -> str:
        """The fields as JSON, without shares and errors, which follow from the answers."""
        return _RESULT.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> ExactMatch:
        """The inverse of :meth:`to_json`; raises pydantic.ValidationError where the text is no such result."""
        return _RESULT.validate_json(text)


_RESULT = TypeAdapter(ExactMatch)


def load_questions(path: Path, *, unanswered: bool = False) -> list[Question]:
    """All questions of the JSONL file ``path``, in order (:mod:`mbq_gguf.conversations`); raises UsageError like its reader.

    Questions without an answer are an error unless ``unanswered``.
    """
    scenes = read_scenes(path, unanswered=unanswered)
    return [Question(scene.image, turn.question, turn.answer or "", turn.task, scene.place) for scene in scenes for turn in scene.turns]


def check_questions(questions: Iterable[Question], file: Path) -> None:
    """Raise UsageError if a question or its answer contains a special token of the GGUF ``file`` (:mod:`mbq_gguf.special_tokens`)."""
    special = file_special_tokens(file)
    for question in questions:
        for words in (question.question, question.expected):
            check_text(words, special, question.place or str(question.image))


def stratified(questions: Sequence[Question], count: int) -> list[Question]:
    """``count`` questions, in file order, spread evenly over the tasks: their numbers differ by at most one."""
    rank: dict[str, int] = {}
    ranked: list[tuple[int, int]] = []
    for index, question in enumerate(questions):
        rank[question.task] = rank.get(question.task, 0) + 1
        ranked.append((rank[question.task], index))
    return [questions[index] for index in sorted(index for _, index in sorted(ranked)[:count])]


def exact_match(
    model: Path,
    mmproj: Path,
    questions: Sequence[Question],
    *,
    threads: int | None = None,
    parallel: int = 1,
    console: Console | None = None,
) -> ExactMatch:
    """Ask ``questions`` through a new llama-server that runs ``model`` with ``mmproj``.

    ``parallel`` questions are in flight at once, each in its own slot; ``threads`` are the server's. On a CPU, slots save no work: 17
    questions took 14.1 s of processor time with 4 slots and 13.9 s with one, with the same answers. Raises UserError if the server
    is missing, does not start or fails, UsageError as :func:`check_questions` does.
    """
    check_questions(questions, model)
    with LlamaServer(model, mmproj, threads=threads, ctx=CONTEXT, parallel=parallel) as server:
        start = time.monotonic()
        answers = ask_all(server, questions, parallel=parallel, console=console, title=model.name)
        return ExactMatch(model.name, time.monotonic() - start, answers)


def ask_all(
    server: LlamaServer, questions: Sequence[Question], *, parallel: int = 1, console: Console | None = None, title: str = "asking"
) -> list[GradedAnswer]:
    """Answers in the order of ``questions``; the progress bar shows the share of right answers so far and the time left."""

    def ask(question: Question) -> GradedAnswer:
        given = server.ask(question.image, question.question, MAX_TOKENS).text.strip()
        return GradedAnswer(question.image.name, question.task, question.question, question.expected, given)

    answers: list[GradedAnswer] = []
    with _progress(console) as progress, ThreadPoolExecutor(parallel) as pool:
        task = progress.add_task(title, total=len(questions), right="")
        try:
            for answer in pool.map(ask, questions):
                answers.append(answer)
                progress.update(task, advance=1, right=f"{_score(answers).share:.1%} right")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers


def _score(answers: Iterable[GradedAnswer]) -> Score:
    marks = [answer.right for answer in answers]
    return Score(len(marks), sum(marks))


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[right]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console or Console(stderr=True))
