"""Calibration samples, one conversation about one image each: from a JSONL file, a folder of images, or the demo's set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mbq_gguf.calibration.generate import greedy_answer
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import open_image

SHIPPED = Path(__file__).parent.parent / "demo" / "data" / "calib" / "calib.jsonl"
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
LINE_SHAPE = '{"image": ..., "turns": [{"question": ..., "answer": ...}]}'
FREE_QUESTION = "Describe this image."
FREE_ANSWER_TOKENS = 128
Turns = Literal["all", "last"]  # of each conversation; the picture's gradient grows with every further turn


@dataclass(frozen=True)
class Sample:
    """A conversation about one image; ``turns`` are (question, answer)."""

    image: Path
    turns: tuple[tuple[str, str], ...]


def load_samples(path: Path | None, loaded: LoadedModel, n: int, seed: int, turns: Turns = "all") -> list[Sample]:
    """``n`` samples drawn by ``seed`` from ``path`` (all of them, in drawn order, where there are fewer), with all of their turns or with
    the last one alone.

    ``path`` is a JSONL file of ``{"image", "turns": [{"question", "answer"}, ...]}`` with image paths relative to it, or a folder of
    images, whose answers the model itself gives greedily to "Describe this image."; None takes the set that ships with the demo.
    Raises UsageError for a path that is neither, UserError for an empty set, a bad line and an image that cannot be read.
    """
    path = SHIPPED if path is None else Path(path)
    draw = random.Random(seed)
    if path.is_dir():
        return _from_folder(path, loaded, n, draw)
    if not path.is_file():
        raise UsageError(f"the calibration set {path} does not exist: give a JSONL file or a folder of images")
    samples = read_jsonl(path)
    drawn = draw.sample(samples, min(n, len(samples)))
    for sample in drawn:
        open_image(sample.image)
    return [replace(sample, turns=sample.turns[-1:]) for sample in drawn] if turns == "last" else drawn


def read_jsonl(path: Path) -> list[Sample]:
    """Every conversation of a JSONL file, in the file's order."""
    try:
        samples = [_sample(entry, path.parent) for entry in _lines(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a line that is not {LINE_SHAPE} ({error!r}): mend or remove it") from error
    if not samples:
        raise UserError(f"the calibration set {path} is empty: give at least one image with a question and an answer")
    return samples


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _sample(entry: Any, root: Path) -> Sample:
    turns = tuple((str(turn["question"]), str(turn["answer"])) for turn in entry["turns"])
    if not turns or not all(answer for _, answer in turns):
        raise ValueError("no turn, or an empty answer")
    return Sample(root / entry["image"], turns)


def _from_folder(folder: Path, loaded: LoadedModel, n: int, draw: random.Random) -> list[Sample]:
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"the calibration folder {folder} has no image in it: give one with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    samples = []
    for image in draw.sample(images, min(n, len(images))):
        answer = greedy_answer(loaded, open_image(image), FREE_QUESTION, FREE_ANSWER_TOKENS)
        if answer:
            samples.append(Sample(image, ((FREE_QUESTION, answer),)))
    if not samples:
        raise UserError(f"the model answers nothing to {FREE_QUESTION!r} on the images in {folder}: give a JSONL file with answers")
    return samples


def fingerprint(samples: Sequence[Sample]) -> str:
    """sha256 over the images' bytes and the turns, in order: the same data give the same calibration."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(hashlib.sha256(sample.image.read_bytes()).digest())
        digest.update(json.dumps(sample.turns).encode())
    return digest.hexdigest()
