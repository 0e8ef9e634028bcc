"""Sets of conversations about pictures, a JSONL file or one JSON array, as LLaVA's are: one reader for convert, imatrix and eval.

A line, or an item of the array, is one conversation about one picture, in one of three shapes: ours ::

    {"image": "cat.png", "turns": [{"question": "What is it?", "answer": "A cat.", "task": "name"}]}

that of LLaVA and ShareGPT ::

    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

and that of OpenAI, with pictures as paths, ``file:`` or ``data:`` URLs, or in ``"images": ["cat.png"]`` ::

    {"messages": [
      {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "What is it?"}]},
      {"role": "assistant", "content": "A cat."}]}

Paths are relative to the file. The picture opens the conversation; system messages are left out, as nobody asks with them here. Other keys
of a line are nobody's business (``id``, ``source``), other keys of a turn are refused: a misspelt ``answer`` would be none.
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

from mbq_gguf.errors import UsageError, said
from mbq_gguf.llama_cpp.cache import cache_root

MARK = re.compile(r"\s*<image>\s*")
LONGEST_NAME = 80  # characters of a picture's name in an error
HUMAN, MODEL, SYSTEM = ("human", "user"), ("gpt", "assistant", "model", "chatgpt"), ("system",)


class Turn(BaseModel):
    """One question about a picture, the expected answer where there is one, and the kind of question it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    task: str = Field(default="all", min_length=1)


class Turns(BaseModel):
    """A line of our own shape."""

    image: str = Field(min_length=1)
    turns: list[Turn] = Field(min_length=1)


class Said(BaseModel):
    """What one side says, in LLaVA's words."""

    speaker: str = Field(alias="from")
    value: str


class Conversation(BaseModel):
    """A line as LLaVA's sets have it."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    conversations: list[Said] = Field(min_length=1)


class Url(BaseModel):
    """Where a picture is, in OpenAI's words."""

    url: str


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image", "image_url"]
    text: str = ""
    image: str | None = None
    image_url: Url | str | None = None

    @property
    def picture(self) -> str | None:
        """The path or URL of a picture; None for text, and for a picture that the line names elsewhere."""
        return self.image_url.url if isinstance(self.image_url, Url) else self.image_url or self.image


class Message(BaseModel):
    """What one side says, in OpenAI's words."""

    role: str
    content: str | list[Part]


class Messages(BaseModel):
    """A line as OpenAI's sets have it."""

    image: str | list[str] | None = None
    images: list[str] | None = None
    messages: list[Message] = Field(min_length=1)


@dataclass(frozen=True)
class Scene:
    """A picture and what is asked about it."""

    image: Path
    turns: tuple[Turn, ...]
    place: str = field(default="", compare=False)  # file and line, for sentences


def read_scenes(path: Path, *, unanswered: bool = False) -> list[Scene]:
    """Every conversation of the file ``path``, in its order; empty lines count for nothing.

    A UsageError names file and line, or item, of what is wrong: no JSON, another shape, a picture that is not there, a question without an
    answer (unless ``unanswered``), no conversation at all.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}): give a JSONL file in UTF-8") from error
    except UnicodeDecodeError as error:
        number = len(re.split(rb"\r\n|\r|\n", content[: error.start]))
        raise UsageError(f"{path}, line {number} is no text in UTF-8: save the file in UTF-8") from error
    scenes = []
    for kind, number, entry in _entries(path, text):
        place = f"{path}, {kind} {number}"
        try:
            scenes.append(_scene(entry, path.parent, unanswered, place))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"{place}: {where + ': ' if where else ''}{first['msg']}: mend or remove the {kind}") from error
        except ValueError as error:
            raise UsageError(f"{place}: {error}: mend or remove the {kind}") from error
    if not scenes:
        raise UsageError(f"the set {path} is empty: give at least one picture with a question")
    return scenes


def _entries(path: Path, text: str) -> Iterator[tuple[str, int, str]]:
    """What may be a conversation each, as JSON, with its number and what to call it."""
    if text.lstrip().startswith("["):
        try:
            items = [json.dumps(item) for item in json.loads(text)]
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as a JSON array ({said(error)}): mend it, or write one conversation a line") from error
        for number, item in enumerate(items, start=1):
            yield "item", number, item
        return
    # Not splitlines(): what Unicode counts as the end of a line may stand in an answer.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip():
            yield "line", number, line


class _Shape(BaseModel):
    """Which of the shapes a line has."""

    conversations: list[object] | None = None
    messages: list[object] | None = None


def _scene(line: str, folder: Path, unanswered: bool, place: str) -> Scene:
    shape = _Shape.model_validate_json(line)
    if shape.conversations is not None:
        talk = Conversation.model_validate_json(line)
        image, turns = _listed(talk.image, talk.images), _turns([(said.speaker, said.value) for said in talk.conversations])
    elif shape.messages is not None:
        image, turns = _of_messages(Messages.model_validate_json(line))
    else:
        ours = Turns.model_validate_json(line)
        image, turns = [ours.image], ours.turns
    if len(image) != 1:
        raise ValueError(f"it has {len(image)} pictures, where a conversation has one")
    file = _file(image[0], folder)
    try:
        there = file.is_file()
    except OSError as error:  # a name that no file system takes
        raise ValueError(f"the image {image[0][:LONGEST_NAME]!r} cannot be read ({(error.strerror or str(error)).lower()})") from error
    if not there:
        raise ValueError(f"the image {file} cannot be read (there is no such file)")
    if not unanswered and any(turn.answer is None for turn in turns):
        raise ValueError("a question has no answer")
    return Scene(file, tuple(turns), place)


def _of_messages(line: Messages) -> tuple[list[str], list[Turn]]:
    images, said = _listed(line.image, line.images), []
    for place, message in enumerate(line.messages):
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        pictures = [part.picture for part in parts if part.picture is not None]
        if pictures and any(other.role in HUMAN for other in line.messages[:place]):
            raise ValueError("a picture comes after the first question, where it opens the conversation")
        images += pictures
        said.append((message.role, "\n".join(part.text for part in parts if part.type == "text")))
    return images, _turns(said)


def _turns(said: list[tuple[str, str]]) -> list[Turn]:
    """Questions with their answers, of sides that speak in turn."""
    turns: list[Turn] = []
    open_question: str | None = None
    for speaker, words in said:
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
            raise ValueError(f"{speaker!r} speaks where user and assistant take turns")
    if open_question is not None:
        turns.append(Turn(question=open_question))
    if not turns:
        raise ValueError("nobody asks anything")
    return turns


def _listed(one: str | list[str] | None, several: list[str] | None) -> list[str]:
    return [*([one] if isinstance(one, str) else one or []), *(several or [])]


def _file(picture: str, folder: Path) -> Path:
    """Where a picture lies; one that stands in the line itself is put into the cache."""
    if picture.startswith("data:"):
        data = base64.b64decode(picture.partition(",")[2], validate=True)
        file = cache_root() / "pictures" / hashlib.sha256(data).hexdigest()[:32]
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.stat().st_size != len(data):
            file.write_bytes(data)
        return file
    if re.match(r"https?://", picture):
        raise ValueError(f"{picture} is on the net, and pictures are read from files")
    return folder / picture.removeprefix("file://")
