"""Evaluates one model on all questions: teacher-forced along the expected answer for its distributions, and greedily for its own answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from mbq_cbind.model import Model
from mbq_cbind.vision import EncodedImage

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.evaluate.classes import token_classes
from mbq_gguf.evaluate.exact_match import MAX_TOKENS, Question
from mbq_gguf.evaluate.kld import Floats, Store, divergence, log_softmax
from mbq_gguf.evaluate.results import Answer, TextResult, spread
from mbq_gguf.picture import png

TEXT_CHUNK = 512  # tokens per chunk of the text; the second half of each is scored, as in llama-perplexity
TEXT_CHUNKS = 8  # maximum: 2048 scored tokens, whose reference takes 200 MB of disk for a vocabulary of 49152

Advance = Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """A file's distributions compared with the reference's, token by token."""

    divergence: list[float]
    agrees: list[bool]


class Ledger:
    """The reference's distributions by key: the first entry for a key becomes the reference, later ones are compared with it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entered: dict[str, tuple[list[int], list[int]]] = {}  # the tokens, and the reference's top-1 at each position

    def compare(self, key: str, tokens: Sequence[int], logits: Floats) -> Comparison:
        """Row i of ``logits`` predicts ``tokens[i]``. Raises UserError if the reference tokenised the text differently."""
        top = logits.argmax(axis=-1).tolist()
        if key not in self._entered:
            self._entered[key] = list(tokens), top
            self._store.put_logits(key, logits)
            return Comparison([0.0] * len(top), [True] * len(top))
        reference_tokens, reference_top = self._entered[key]
        reference = self._store.logits(key)
        if reference_tokens != list(tokens) or reference.shape != logits.shape:
            raise UserError("the files have different tokenisers: compare files that were made from one model")
        return Comparison(divergence(reference, logits).tolist(), [a == b for a, b in zip(reference_top, top, strict=True)])


class Evaluator:
    """Evaluates several files on the same questions, starting with the reference.

    Pictures are encoded once per mmproj file; set :attr:`pictures` to its name before evaluating a file. Questions without an expected
    answer get the reference's own answer, which :attr:`questions` has after the reference was evaluated.
    """

    def __init__(self, questions: Sequence[Question], text: str | None, store: Store) -> None:
        self.questions = list(questions)
        self.pictures = ""
        self._text = text
        self._store = store
        self._ledger = Ledger(store)
        self._own: dict[int, list[int]] = {}  # tokens of the reference's answers to questions without an expected one
        # Questions about the same picture are consecutive, so that it stays in the model's context.
        self._order = sorted(range(len(questions)), key=lambda i: str(questions[i].image))

    def check_room(self, model: Model, context: int, sizes: Mapping[Path, tuple[int, int]]) -> None:
        """Raise UsageError if a picture of the given ``sizes`` (width, height), with question and answer, exceeds ``context`` tokens."""
        pictures = {path: model.vision.tokens(*size) for path, size in sizes.items()}
        for question in self.questions:
            asked = len(model.tokenize(model.prompt(question.question), special=True))
            need = pictures[question.image] + asked + max(MAX_TOKENS, len(model.tokenize(question.expected)) + 1)
            if need > context:
                raise UsageError(
                    f"{question.image} with the question {question.question[:80]!r} needs {need} tokens of a context of {context}: "
                    f"give --context {-(-need // 512) * 512}"
                )

    def answers(self, model: Model, advance: Advance) -> list[Answer]:
        """The model's answers in the order of the questions."""
        found: dict[int, Answer] = {}
        image: EncodedImage | None = None
        for place, index in enumerate(self._order):
            path = self.questions[index].image
            if image is None or path != self.questions[self._order[place - 1]].image:
                image = self._encoded(model, index)
            found[index] = self._answer(model, index, image)
            advance()
        return [found[index] for index in range(len(self.questions))]

    def text(self, model: Model, chunks: Sequence[list[int]], advance: Advance) -> TextResult | None:
        """Divergence and perplexity on ``chunks`` of the text, None if there are none."""
        compared: list[Comparison] = []
        losses: list[float] = []
        for index, chunk in enumerate(chunks):
            scored = chunk[len(chunk) // 2 :]
            logits = model.text_logits(chunk[:-1], outputs=len(scored))
            compared.append(self._ledger.compare(f"text-{index}", scored, logits))
            losses += (-log_softmax(logits)[np.arange(len(scored)), scored]).tolist()
            advance()
        if not compared:
            return None
        agreement = float(np.mean([same for part in compared for same in part.agrees]))
        return TextResult(spread(part.divergence for part in compared), agreement, float(np.exp(np.mean(losses))))

    def chunks(self, model: Model) -> list[list[int]]:
        """The text's tokens in chunks, each with the model's BOS if it has one. Raises UsageError if the text is too short."""
        if self._text is None:
            return []
        opening = model.tokenize("", special=True)
        tokens = model.tokenize(self._text[: 16 * TEXT_CHUNK * TEXT_CHUNKS])
        size = TEXT_CHUNK - len(opening)
        chunks = [[*opening, *tokens[start : start + size]] for start in range(0, len(tokens) - size + 1, size)]
        if not chunks:
            raise UsageError(f"the text has {len(tokens)} tokens: give a file with at least {size}")
        return chunks[:TEXT_CHUNKS]

    def _encoded(self, model: Model, index: int) -> EncodedImage:
        key = f"{self.pictures}-{self._order.index(index)}"
        stored = self._store.image(key)
        if stored is None:
            with NamedTemporaryFile(suffix=".png") as seen:  # the same pixels as everywhere else, not the original file
                seen.write(png(self.questions[index].image))
                seen.flush()
                stored = model.vision.encode(Path(seen.name))
            self._store.put_image(key, stored)
        return stored

    def _answer(self, model: Model, index: int, image: EncodedImage) -> Answer:
        question = self.questions[index]
        prompt = model.prompt(question.question)
        if not question.expected:
            self._own[index] = self._generated(model, prompt, image)
            question = self.questions[index] = replace(question, expected=model.text(self._own[index]))
        tokens = self._own.get(index) or [*model.tokenize(question.expected), model.end_of_answer]
        logits = model.logits(prompt, [image], tokens)
        compared = self._ledger.compare(f"question-{index}", tokens, logits)
        given = model.text(self._greedy(model, prompt, image, tokens, logits)).strip()
        said = tokens[:-1] if model.is_end(tokens[-1]) else tokens
        classes = token_classes([model.text([token]) for token in said])[: len(tokens)]
        return Answer(index, given, given == question.expected.strip(), compared.divergence, compared.agrees, classes)

    def _generated(self, model: Model, prompt: str, image: EncodedImage) -> list[int]:
        """The model's own answer, with the token that ends it, unless it is too long."""
        tokens = model.generate(prompt, [image], limit=MAX_TOKENS)
        return tokens if len(tokens) == MAX_TOKENS else [*tokens, model.end_of_answer]

    def _greedy(self, model: Model, prompt: str, image: EncodedImage, tokens: list[int], logits: Floats) -> list[int]:
        """The greedy answer. It equals the forced answer up to the first token that is not top-1; for most answers there is none."""
        top = logits.argmax(axis=-1).tolist()
        same = 0
        while same < len(tokens) and top[same] == tokens[same]:
            same += 1
        if same == len(tokens) or model.is_end(top[same]):
            return [token for token in tokens[:same] if not model.is_end(token)]
        return model.generate(prompt, [image], limit=max(MAX_TOKENS, len(tokens)), opening=[*tokens[:same], top[same]])
