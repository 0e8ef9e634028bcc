"""Calibration samples, one conversation about one image each: from a JSONL file, a folder of images, or the demo's set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mbq_gguf.calibration.generate import greedy_answer, whole_decoder
from mbq_gguf.conversations import read_scenes
from mbq_gguf.errors import UsageError, UserError, error_context
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import Prompts
from mbq_gguf.parallel import parallel_map_values
from mbq_gguf.picture import open_picture, suffixes
from mbq_gguf.special_tokens import check_text, tokenizer_special_tokens

SHIPPED = Path(__file__).parent.parent / "demo" / "data" / "calib" / "calib.jsonl"
NAMED = 5  # skipped files that are named
FREE_QUESTION = "Describe this image."
FREE_ANSWER_TOKENS = 128
Say = Callable[[str], None]
Turns = Literal["all", "last"]  # which turns of a conversation; the picture's gradient grows with each turn


@dataclass(frozen=True)
class Sample:
    """A conversation about one image; ``turns`` are (question, answer)."""

    image: Path
    turns: tuple[tuple[str, str], ...]
    place: str = field(default="", compare=False)  # file and line, for messages


def load_samples(
    path: Path | None, loaded: LoadedModel, n: int, seed: int, turns: Turns = "all", say: Say = lambda sentence: None
) -> list[Sample]:
    """Load ``n`` samples from ``path``, chosen and ordered by ``seed`` (all if there are fewer), with all of their turns or only the last.

    ``path`` is a JSONL file (:mod:`mbq_gguf.conversations`) or a folder of images, for which the model generates answers to
    "Describe this image." greedily; None means the set that ships with the demo. ``say`` receives sentences about what is skipped.
    Raises UsageError if a path is neither, a set is empty or a line is invalid, UserError if an image cannot be read.
    """
    return draw_samples(path, loaded.prompts, n, seed, turns, say).answered(loaded, say)


@dataclass(frozen=True)
class Drawn:
    """The calibration set, as far as it is known without the model's weights: samples, or the pictures of ``folder``, which the model has
    yet to describe.
    """

    samples: Sequence[Sample] = ()
    pictures: Sequence[Path] = ()
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.samples) + len(self.pictures)

    def answered(self, loaded: LoadedModel, say: Say) -> list[Sample]:
        """The samples; for a folder, with the model's answers. Raises UserError if it gives none."""
        samples = list(self.samples)

        def answer_to(image: Path) -> str:
            return greedy_answer(loaded, open_picture(image), FREE_QUESTION, FREE_ANSWER_TOKENS)

        with whole_decoder(loaded) if self.pictures else nullcontext():
            for image, answer in zip(self.pictures, parallel_map_values(self.pictures, answer_to), strict=True):
                if answer:
                    samples.append(Sample(image, ((FREE_QUESTION, answer),)))
        if not samples:
            raise UserError(
                f"the model answers nothing to {FREE_QUESTION!r} on the images in {self.folder}: give a JSONL file with answers"
            )
        if len(samples) < len(self):
            say(f"the model answers nothing about {len(self) - len(samples)} of {len(self)} pictures of {self.folder}, which are left out")
        return samples


def draw_samples(path: Path | None, prompts: Prompts, n: int, seed: int, turns: Turns, say: Say) -> Drawn:
    """Choose what :func:`load_samples` loads, opening each picture and encoding each conversation once; raises the same errors."""
    path = SHIPPED if path is None else Path(path)
    draw = random.Random(seed)
    if path.is_dir():
        pictures = _draw_pictures(path, n, draw, say)
        for picture in pictures:
            prompts.encode(picture, [(FREE_QUESTION, "")])
        return Drawn(pictures=pictures, folder=path)
    if not path.is_file():
        raise UsageError(f"the calibration set {path} does not exist: give a JSONL file or a folder of images")
    samples = read_jsonl(path)
    drawn = draw.sample(samples, min(n, len(samples)))
    _say_fewer(len(drawn), n, path, say)
    special = tokenizer_special_tokens(prompts.tokenizer)
    for sample in drawn:
        for words in (words for turn in sample.turns for words in turn):
            check_text(words, special, sample.place)
    if turns == "last":
        drawn = [replace(sample, turns=sample.turns[-1:]) for sample in drawn]
    for sample in drawn:
        with error_context(sample.place):
            prompts.encode(sample.image, sample.turns)
    return Drawn(drawn)


def read_jsonl(path: Path) -> list[Sample]:
    """All conversations of a JSONL file, in order."""
    scenes = read_scenes(path)
    return [Sample(scene.image, tuple((turn.question, turn.answer or "") for turn in scene.turns), scene.place) for scene in scenes]


def _draw_pictures(folder: Path, n: int, draw: random.Random, say: Say) -> list[Path]:
    """Choose ``n`` pictures of ``folder``. Raises UserError if it has none."""
    known = suffixes()
    files = sorted(folder.iterdir())
    images = [file for file in files if file.suffix.lower() in known and file.is_file() and not file.name.startswith(".")]
    if not images:
        raise UserError(f"the calibration folder {folder} has no image in it: give one with PNG, JPEG, WebP or other picture files")
    skipped = [f"{file.name} ({_why_skipped(file)})" for file in files if file not in set(images)]
    if skipped:
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        say(f"{len(skipped)} of {len(files)} entries of {folder} are left out: {', '.join(skipped[:NAMED])}{more}")
    drawn = draw.sample(images, min(n, len(images)))
    _say_fewer(len(drawn), n, folder, say)
    return drawn


def _say_fewer(drawn: int, asked: int, path: Path, say: Say) -> None:
    if drawn < asked:
        say(f"calibrating with {drawn} samples, all that {path} holds; {asked} were asked for")


def _why_skipped(file: Path) -> str:
    if file.is_symlink() and not file.exists():
        return "a link to nothing"
    if file.is_dir():
        return "a folder"
    return "a hidden file" if file.name.startswith(".") else "no picture by its ending"


def fingerprint(samples: Sequence[Sample]) -> str:
    """sha256 of the images' bytes and the turns, in order: identical data give identical calibration."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(hashlib.sha256(sample.image.read_bytes()).digest())
        digest.update(json.dumps(sample.turns).encode())
    return digest.hexdigest()
