"""Reads data sets of conversations about pictures (JSONL, or one JSON array like LLaVA's), for convert, imatrix and eval.

A line, or an item of the array, is one conversation about one picture, in one of three formats: ours ::

    {"image": "cat.png", "turns": [{"question": "What is it?", "answer": "A cat.", "task": "name"}]}

that of LLaVA and ShareGPT ::

    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

and that of OpenAI, with pictures as paths, ``file:`` or ``data:`` URLs, or in ``"images": ["cat.png"]`` ::

    {"messages": [
      {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "What is it?"}]},
      {"role": "assistant", "content": "A cat."}]}

Paths are relative to the file. The picture comes first in the conversation. System messages are ignored, because prompts have none here.
Unknown keys of a line are ignored (``id``, ``source``), but those of a turn are rejected, since a misspelt ``answer`` would be lost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mbq_gguf.errors import UsageError, describe
from mbq_gguf.llama_cpp.cache import cache_root

MARK = re.compile(r"\s*<image>\s*")
LONGEST_NAME = 80  # characters of a picture's name in an error
HUMAN, MODEL, SYSTEM = ("human", "user"), ("gpt", "assistant", "model", "chatgpt"), ("system",)


class Turn(BaseModel):
    """One question about a picture, the expected answer, if any, and the kind of question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    task: str = Field(default="all", min_length=1)


class Turns(BaseModel):
    """A line in our own format."""

    image: str = Field(min_length=1)
    turns: list[Turn] = Field(min_length=1)


class Said(BaseModel):
    """A message in LLaVA's format."""

    speaker: str = Field(alias="from")
    value: str


class Conversation(BaseModel):
    """A line in LLaVA's format."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    conversations: list[Said] = Field(min_length=1)


class Url(BaseModel):
    """The address of a picture in OpenAI's format."""

    url: str


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text", "image", "image_url"]
    text: str = ""
    image: str | None = None
    image_url: Url | str | None = None

    @property
    def picture(self) -> str | None:
        """The path or URL of a picture; None for text, and for a picture whose path is in ``images``."""
        return self.image_url.url if isinstance(self.image_url, Url) else self.image_url or self.image


class Message(BaseModel):
    """A message in OpenAI's format."""

    role: str
    content: str | list[Part]


class Messages(BaseModel):
    """A line in OpenAI's format."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    messages: list[Message] = Field(min_length=1)


@dataclass(frozen=True)
class Scene:
    """A picture and the questions about it."""

    image: Path
    turns: tuple[Turn, ...]
    place: str = field(default="", compare=False)  # file and line, for error messages


def read_scenes(path: Path, *, unanswered: bool = False) -> list[Scene]:
    """All conversations of the file ``path``, in order; empty lines are skipped.

    Raises UsageError, with file and line or item, for invalid JSON, another format, a missing picture, a question without an answer (unless
    ``unanswered``), and a file without conversations.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}): give a JSONL file in UTF-8") from error
    except UnicodeDecodeError as error:
        number = len(re.split(rb"\r\n|\r|\n", content[: error.start]))
        raise UsageError(f"{path}, line {number} is not valid UTF-8: give a JSONL file in UTF-8") from error
    scenes = []
    for kind, number, entry in _entries(path, text):
        place = f"{path}, {kind} {number}"
        try:
            scenes.append(_scene(entry, path.parent, unanswered, place))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"{place}: {where + ': ' if where else ''}{first['msg']}: correct or remove the {kind}") from error
        except ValueError as error:
            raise UsageError(f"{place}: {error}: correct or remove the {kind}") from error
    if not scenes:
        raise UsageError(f"the set {path} is empty: give at least one picture with a question")
    return scenes


def _entries(path: Path, text: str) -> Iterator[tuple[str, int, str]]:
    """The lines or items of ``text`` as JSON, each with its kind ("line" or "item") and number."""
    if text.lstrip().startswith("["):
        try:
            items = [json.dumps(item) for item in json.loads(text)]
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} cannot be read as a JSON array ({describe(error)}): correct it, or write one conversation per line"
            ) from error
        for number, item in enumerate(items, start=1):
            yield "item", number, item
        return
    # Not splitlines(): answers may contain characters that Unicode counts as line ends.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip():
            yield "line", number, line


class _Shape(BaseModel):
    """Which of the formats a line has."""

    conversations: list[object] | None = None
    messages: list[object] | None = None


def _scene(line: str, folder: Path, unanswered: bool, place: str) -> Scene:
    shape = _Shape.model_validate_json(line)
    if shape.conversations is not None:
        talk = Conversation.model_validate_json(line)
        image, turns = _listed(talk.image, talk.images), _turns([(each.speaker, each.value) for each in talk.conversations])
    elif shape.messages is not None:
        image, turns = _of_messages(Messages.model_validate_json(line))
    else:
        ours = Turns.model_validate_json(line)
        image, turns = [ours.image], ours.turns
    if len(image) != 1:
        raise ValueError(f"it has {len(image)} pictures instead of one")
    file = _file(image[0], folder)
    try:
        there = file.is_file()
    except OSError as error:  # a name that the file system rejects
        raise ValueError(f"the image {image[0][:LONGEST_NAME]!r} cannot be read ({(error.strerror or str(error)).lower()})") from error
    if not there:
        raise ValueError(f"the image {file} cannot be read (there is no such file)")
    if not unanswered and any(turn.answer is None for turn in turns):
        raise ValueError("a question has no answer")
    return Scene(file, tuple(turns), place)


def _of_messages(line: Messages) -> tuple[list[str], list[Turn]]:
    images, messages = _listed(line.image, line.images), []
    for place, message in enumerate(line.messages):
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        pictures = [part.picture for part in parts if part.picture is not None]
        if pictures and any(other.role in HUMAN for other in line.messages[:place]):
            raise ValueError("a picture comes after the first question, where it opens the conversation")
        images += pictures
        messages.append((message.role, "\n".join(part.text for part in parts if part.type == "text")))
    return images, _turns(messages)


def _turns(messages: list[tuple[str, str]]) -> list[Turn]:
    """Pair questions with answers, from alternating messages."""
    turns: list[Turn] = []
    open_question: str | None = None
    for speaker, words in messages:
        if speaker in SYSTEM:
            continue
        if speaker in HUMAN and open_question is None:
            if MARK.search(words) and turns:
                raise ValueError("a picture comes after the first question, where it opens the conversation")
            open_question = MARK.sub("", words)
        elif speaker in MODEL and open_question is not None:
            if not words:
                raise ValueError("an answer is empty")
            turns.append(Turn(question=open_question, answer=words))
            open_question = None
        else:
            raise ValueError(f"{speaker!r} is out of turn: user and assistant must alternate")
    if open_question is not None:
        turns.append(Turn(question=open_question))
    if not turns:
        raise ValueError("it has no question")
    return turns


def _listed(one: str | list[str] | None, several: list[str] | None) -> list[str]:
    return [*([one] if isinstance(one, str) else one or []), *(several or [])]


def _file(picture: str, folder: Path) -> Path:
    """The path of a picture; one that is given as a data: URL is written to the cache."""
    if picture.startswith("data:"):
        data = base64.b64decode(picture.partition(",")[2], validate=True)
        file = cache_root() / "pictures" / hashlib.sha256(data).hexdigest()[:32]
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.stat().st_size != len(data):
            file.write_bytes(data)
        return file
    if re.match(r"https?://", picture):
        raise ValueError(f"{picture} is a URL, but pictures are read from files")
    return folder / picture.removeprefix("file://")
