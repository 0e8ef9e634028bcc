"""A question about an image to token ids and image inputs, with the model's own tokenizer, image processor and chat template.

The prompt is what llama-server makes of an OpenAI-style message whose content is the image first, then the question; how libmtmd
writes a picture is in pictures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from mbq_gguf.errors import UserError, said
from mbq_gguf.models.pictures import Picture
from mbq_gguf.picture import open_picture

CHECKED = (224, 224)  # pixels of a picture that every family takes
TextTurns = Sequence[tuple[str, str]]  # question, answer
Spoken = Sequence[tuple[str, str]]  # role, words
MARK = "<__picture__>"  # the first one in a text: pictures come before words
# Which tokens stand for the answer where modalities are weighed (Encoded.counted).
AnswerMask = Literal["header", "predicting", "answer"]


@dataclass
class Encoded:
    """One conversation about one image as the model takes it. ``inputs`` are the keyword arguments of the model's forward.

    ``vision``, ``answer`` and ``header`` are bool masks [tokens]. Answer tokens include the end-of-turn token, which the model must learn
    to write. The header is what the chat template writes to open each answer, at least the one token before it.
    """

    inputs: dict[str, torch.Tensor]
    vision: torch.Tensor
    answer: torch.Tensor
    header: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """Token ids [tokens]."""
        return self.inputs["input_ids"][0]

    def counted(self, mask: AnswerMask) -> torch.Tensor:
        """The tokens that stand for the answer, bool [tokens]: with their headers as MBQ's authors have it, those whose logits predict an
        answer token, or the answers alone.

        Position n predicts token n + 1, so the first answer token's gradient enters at the header's last token, and none at an end token.
        """
        if mask == "predicting":
            return torch.cat([self.answer[1:], self.answer.new_zeros(1)])
        return self.answer | self.header if mask == "header" else self.answer


class ImagePrompt(Protocol):
    """Renders conversations of (role, words), the picture before the first words, and turns the text into model inputs [1, tokens].

    ``picture_ids`` are the tokens that stand where the runtime has embeddings from the vision file.
    """

    picture_ids: tuple[int, ...]

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """The text of ``spoken``, with a place for the picture; ``opened`` ends it with what opens an answer."""
        ...

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """Model inputs of the ``text`` of a conversation with its ``image``."""
        ...

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for token ids [texts, tokens] without any image."""
        ...


class RuntimePrompt:
    """The prompt of llama-server and libmtmd: words as one string with a mark for the picture, which gives way to a :class:`Picture`."""

    def __init__(self, template: Any, tokenizer: Any, image_processor: Any, picture: Picture, image_token_id: int, config: Any) -> None:
        self.template, self.tokenizer, self.image_processor = template, tokenizer, image_processor
        self.picture, self.image_token_id, self.config = picture, image_token_id, config
        begun, bos = tokenizer("")["input_ids"][:1], tokenizer.bos_token_id
        self.picture_ids = (image_token_id, *tokenizer.convert_tokens_to_ids(list(picture.inside)))
        self.begin = begun if bos is not None and begun == [bos] else []  # llama.cpp adds it, and takes the template's own away

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """As llama-server renders it: strings, or one typed part each where the template takes nothing else."""
        marked = [(role, MARK + words if index == 0 else words) for index, (role, words) in enumerate(spoken)]
        for typed in (False, True):
            messages = [{"role": role, "content": [{"type": "text", "text": words}] if typed else words} for role, words in marked]
            text = self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, enable_thinking=True)
            if all(words.strip() in text for _, words in marked):
                return str(text)
        raise ValueError("it leaves out what is said")

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """Each piece is cut into tokens by itself, as libmtmd does."""
        image = self.picture.prepare(image) if self.picture.prepare else image
        found = self.image_processor(images=[image], return_tensors="pt", **self.picture.options)
        before, _, after = text.removeprefix(self.tokenizer.bos_token if self.begin else "").partition(MARK)
        pieces: list[str | int] = [before, *self.picture.pieces(found, self.image_processor, self.config), after]
        ids = list(self.begin)
        for piece in pieces:
            if isinstance(piece, int):
                ids += [self.image_token_id] * piece
            else:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        row = torch.tensor([ids])
        types = {self.picture.types: (row == self.image_token_id).int()} if self.picture.types else {}
        return {"input_ids": row, **types, **{name: found[name] for name in self.picture.features}}

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids, and types of tokens where the family has them: all text."""
        types = {self.picture.types: torch.zeros_like(ids, dtype=torch.int32)} if self.picture.types else {}
        return {"input_ids": ids, **types}


class ProcessorImagePrompt:
    """Any family whose AutoProcessor loads: the text round a picture is that of transformers."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor = processor
        self.picture_ids: tuple[int, ...] = (image_token_id,)

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """As the processor renders it, the picture before the first words."""
        messages: list[dict[str, Any]] = []
        for index, (role, words) in enumerate(spoken):
            content: list[dict[str, str]] = [{"type": "image"}] if index == 0 else []
            messages.append({"role": role, "content": [*content, {"type": "text", "text": words}]})
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        inputs = self.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
        # Batch 1 without padding: the mask is all ones, and leaving it out lets attention use its causal path.
        return {name: value for name, value in inputs.items() if name != "attention_mask" and isinstance(value, torch.Tensor)}

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids alone."""
        return {"input_ids": ids}


class NoImagePrompt:
    """For a language model that is converted alone: texts, and no conversation about a picture."""

    picture_ids: tuple[int, ...] = ()

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """ValueError: nobody asks it."""
        raise ValueError("a language model that is converted alone is asked nothing")

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        raise ValueError("a language model that is converted alone sees nothing")

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids alone."""
        return {"input_ids": ids}


@dataclass
class Prompts:
    """Chat template, tokenizer and image processing of one model."""

    tokenizer: Any
    image_prompt: ImagePrompt
    image_token_id: int
    end_ids: frozenset[int]  # tokens that end an answer
    begin: tuple[int, ...] = ()  # tokens with which each text begins, where they are others than the tokenizer's bos_token

    @property
    def text_begin(self) -> tuple[int, ...]:
        """The tokens with which each text begins."""
        bos = self.tokenizer.bos_token_id
        return self.begin or (() if bos is None else (int(bos),))

    def encode(self, image: Path | Image.Image, turns: TextTurns) -> Encoded:
        """A conversation about ``image``. An empty last answer leaves the prompt open, for generation."""
        opened = open_picture(image) if isinstance(image, Path) else image
        text = self._render(turns[:0], turns[0][0])
        try:
            inputs = self.image_prompt(text, opened)
        except Exception as error:  # whatever the settings in a directory make an image processor raise
            name = image if isinstance(image, Path) else "a picture"
            raise UserError(
                f"the model's image processor cannot take {name} ({said(error)}): check preprocessor_config.json and tokenizer_config.json"
            ) from error
        prefix = inputs["input_ids"].shape[1]
        more, answer, header = self._answers(turns)
        opening = self._header(turns, 0, prefix)
        for name, value in inputs.items():
            if name == "input_ids":
                inputs[name] = torch.cat([value, torch.tensor([more], dtype=value.dtype)], dim=1)
            elif value.ndim == 2 and value.shape == (1, prefix):  # token types: what follows is text
                inputs[name] = torch.cat([value, value.new_zeros(1, len(more))], dim=1)
        ids = inputs["input_ids"][0]
        masks = ([False] * prefix + answer, [False] * (prefix - opening) + [True] * opening + header)
        return Encoded(
            inputs, torch.isin(ids, torch.tensor(self.image_prompt.picture_ids)), *(torch.tensor(mask, dtype=torch.bool) for mask in masks)
        )

    def check(self) -> None:
        """Raise UserError where the chat template, the tokenizer or the image processor do not do for a small conversation."""
        encoded = self.encode(Image.new("RGB", CHECKED), [("What?", "This."), ("Where?", "There.")])
        if not encoded.vision.any():
            raise UserError("the model's chat template has no place for pictures: give the model the template of its family")

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for token ids [texts, tokens] without any image."""
        return self.image_prompt.text_inputs(ids)

    def encode_text(self, ids: torch.Tensor) -> Encoded:
        """A text of token ids [tokens], with neither picture nor answer."""
        none = torch.zeros(len(ids), dtype=torch.bool)
        return Encoded(self.text_inputs(ids[None]), none, none, none)

    def _answers(self, turns: TextTurns) -> tuple[list[int], list[bool], list[bool]]:
        """Ids after the first prompt, and which of them are answer and header tokens: answer, end token, next question, next answer."""
        ids: list[int] = []
        answers: list[bool] = []
        headers: list[bool] = []
        for index, (_, answer) in enumerate(turns):
            if not answer:
                break
            said = self._ids(answer)
            after = self._ids(self._between(turns, index))
            ended = len(said) + (1 if after and after[0] in self.end_ids else 0)
            last = index + 1 == len(turns)
            # The last turn stops at its end token: what the template writes after it is never generated.
            chunk = said + (after[: ended - len(said)] if last else after)
            opening = 0 if last else self._header(turns, index + 1, len(chunk) - ended)
            ids += chunk
            answers += [position < ended for position in range(len(chunk))]
            headers += [position >= len(chunk) - opening for position in range(len(chunk))]
        return ids, answers, headers

    def _header(self, turns: TextTurns, index: int, room: int) -> int:
        """How many of the ``room`` tokens before answer ``index`` open it: what the template writes when it is to be generated and not
        otherwise, or the last one, where the question's own end opens the answer. None where there is no answer."""
        if not turns[index][1]:
            return 0
        opened, closed = (self._ids(self._render(turns[:index], turns[index][0], opened=opened)) for opened in (True, False))
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opened, closed, strict=False)))
        return min(max(len(opened) - shared, 1), room)

    def _between(self, turns: TextTurns, index: int) -> str:
        """What the template writes between answer ``index`` and the next answer, or the end of the conversation."""
        before = self._render(turns[:index], turns[index][0]) + turns[index][1]
        whole = self._render(turns[: index + 1], turns[index + 1][0] if index + 1 < len(turns) else None)
        if not whole.startswith(before):
            raise UserError(
                "the model's chat template rewrites answers, so their tokens cannot be told: give the model one that keeps them"
            )
        return whole[len(before) :]

    def _render(self, done: TextTurns, question: str | None, opened: bool = True) -> str:
        """The conversation so far, then ``question`` where there is one, its answer ``opened``. The first question carries the image."""
        spoken = [words for turn in done for words in zip(("user", "assistant"), turn, strict=True)]
        spoken += [("user", question)] if question is not None else []
        try:
            return self.image_prompt.conversation(spoken, opened and question is not None)
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"the model's chat template cannot be rendered ({said(error)}): give the model one that renders") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
