"""The results of an evaluation as plain data, and their summaries for tables and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mbq_gguf.evaluate.classes import CLASSES


@dataclass(frozen=True)
class Answer:
    """One file's answer to one question. The last three lists have an entry per answer token, including the one that ends the turn."""

    question: int  # index into Evaluation.questions
    given: str  # greedy, stripped of white space
    right: bool
    divergence: list[float]  # nats from the reference's distribution, given the question, the picture and the answer so far
    agrees: list[bool]  # whether the most probable token is the reference's
    classes: list[str]


@dataclass(frozen=True)
class Spread:
    """Statistics of a divergence over tokens, in nats. ``error`` is the standard error of the mean, over questions."""

    tokens: int
    mean: float
    error: float
    median: float
    p99: float


@dataclass(frozen=True)
class TextResult:
    """Results on the text, without pictures: divergence from the reference, share of equal top-1, and the file's own perplexity."""

    divergence: Spread
    agreement: float
    perplexity: float
    clipped: dict[str, float] = field(default_factory=dict)  # as in FileResult


@dataclass(frozen=True)
class Layers:
    """Values per decoder layer, in order; empty if unknown. Errors are relative squared errors of the weights."""

    ratio_attention: list[float] = field(default_factory=list)
    ratio_mlp: list[float] = field(default_factory=list)
    error_attention: list[float] = field(default_factory=list)
    error_mlp: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FileResult:
    """The results of one GGUF file. ``clipped`` is the share of activations beyond their static range on the questions, by class of token;
    empty without static ranges."""

    name: str
    path: str
    file_bytes: int
    bits_per_weight: float  # over all tensors
    layer_bits_per_weight: float  # over the matrices of the decoder's layers
    seconds: float  # questions and text
    answers: list[Answer]
    text: TextResult | None
    layers: Layers
    clipped: dict[str, float] = field(default_factory=dict)

    @property
    def exact_match(self) -> float:
        """Share of questions answered with exactly the expected text."""
        return float(np.mean([answer.right for answer in self.answers]))

    @property
    def exact_match_error(self) -> float:
        """The binomial standard error of the exact match."""
        return sqrt(self.exact_match * (1 - self.exact_match) / len(self.answers))

    @property
    def agreement(self) -> float:
        """Share of answer tokens whose top-1 is the reference's."""
        return float(np.mean([same for answer in self.answers for same in answer.agrees]))

    @property
    def divergence(self) -> Spread:
        """Statistics over all answer tokens."""
        return spread([answer.divergence for answer in self.answers])

    def class_divergence(self) -> dict[str, Spread]:
        """Statistics over the tokens of each class that occurs."""
        groups = {name: [[d for d, c in zip(a.divergence, a.classes, strict=True) if c == name] for a in self.answers] for name in CLASSES}
        return {name: spread(values) for name, values in groups.items() if any(values)}


@dataclass(frozen=True)
class Asked:
    """One question. ``expected`` is the text that answers are compared with and that the models are forced along."""

    image: str
    question: str
    expected: str
    task: str


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation. The reference is files[0]; its divergence is zero."""

    data: str
    mmproj: str
    text: str | None
    questions: list[Asked]
    files: list[FileResult]

    def tasks(self) -> list[str]:
        """Names of the tasks, sorted."""
        return sorted({asked.task for asked in self.questions})

    def task_match(self, file: FileResult) -> dict[str, float]:
        """Share of right answers per task."""
        return {task: _share(a.right for a in file.answers if self.questions[a.question].task == task) for task in self.tasks()}

    def worst(self, file: FileResult, count: int) -> list[Answer]:
        """The answers of ``file`` with the highest mean divergence, worst first; answers without divergence are left out."""
        changed = [answer for answer in file.answers if any(answer.divergence)]
        return sorted(changed, key=lambda answer: -float(np.mean(answer.divergence)))[:count]

    def to_json(self) -> str:
        """All figures of the tables and all answers, as JSON."""
        document: dict[str, Any] = TypeAdapter(Evaluation).dump_python(self)
        for entry, file in zip(document["files"], self.files, strict=True):
            entry["summary"] = {
                "exact_match": file.exact_match,
                "exact_match_error": file.exact_match_error,
                "exact_match_by_task": self.task_match(file),
                "agreement": file.agreement,
                "divergence": file.divergence,
                "divergence_by_class": file.class_divergence(),
                "clipped": file.clipped,
            }
        return TypeAdapter(dict[str, Any]).dump_json(document, indent=1).decode()


def spread(groups: Iterable[Iterable[float]]) -> Spread:
    """Mean, median and 99th percentile over all values; for the error of the mean, each group (a question) is one sample.

    Tokens of one answer are not independent, so the error is that of a ratio of sums over groups (delta method).
    """
    arrays = [np.asarray(list(group), np.float64) for group in groups]
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    if not values.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0)
    mean = float(values.mean())
    residuals = np.array([array.sum() - mean * array.size for array in arrays])
    draws = sum(1 for array in arrays if array.size)
    error = sqrt(float((residuals**2).sum()) * draws / max(draws - 1, 1)) / values.size
    return Spread(int(values.size), mean, error, float(np.median(values)), float(np.percentile(values, 99)))


def _share(marks: Iterable[bool]) -> float:
    return float(np.mean(list(marks)))


def short_names(paths: list[Path]) -> list[str]:
    """File names, with as many of their folders as needed to distinguish them."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
