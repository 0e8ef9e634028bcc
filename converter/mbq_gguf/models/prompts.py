"""Turns a question about an image into token ids and image inputs, with the model's own tokenizer, image processor and chat template.

The prompt is the one that llama-server makes of an OpenAI-style message whose content is first the image, then the question. pictures.py
has the tokens that libmtmd substitutes for a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from mbq_gguf.errors import UserError, describe
from mbq_gguf.models.pictures import Picture
from mbq_gguf.picture import open_picture

CHECKED = (224, 224)  # size in pixels of a picture that every family accepts
TextTurns = Sequence[tuple[str, str]]  # question, answer
Spoken = Sequence[tuple[str, str]]  # role, words
MARK = "<__picture__>"  # the first one in a text counts: the picture comes before the words
# Which tokens count as the answer when modalities are weighed (Encoded.counted).
AnswerMask = Literal["header", "predicting", "answer"]


@dataclass
class Encoded:
    """One conversation about one image, encoded. ``inputs`` are the keyword arguments of the model's forward.

    ``vision``, ``answer`` and ``header`` are bool masks [tokens]. Answer tokens include the end-of-turn token, which the model must
    generate. The header is what the chat template writes before each answer, at least one token.
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
        """The tokens that count as the answer, bool [tokens]: the answers with their headers (as MBQ's authors do), the tokens whose logits
        predict an answer token, or the answers only.

        Position n predicts token n + 1, so the gradient of the first answer token enters at the last token of the header, and none enters
        at an end token.
        """
        if mask == "predicting":
            return torch.cat([self.answer[1:], self.answer.new_zeros(1)])
        return self.answer | self.header if mask == "header" else self.answer


class ImagePrompt(Protocol):
    """Renders conversations of (role, words), with the picture before the first words, and turns the text into model inputs [1, tokens].

    ``picture_ids`` are the tokens that the runtime replaces by embeddings from the vision file.
    """

    picture_ids: tuple[int, ...]

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """The text of ``spoken``, with a mark for the picture; if ``opened``, it ends with the header of an answer."""
        ...

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """Model inputs for the ``text`` of a conversation with its ``image``."""
        ...

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Model inputs for token ids [texts, tokens] without any image."""
        ...


class RuntimePrompt:
    """The prompt of llama-server and libmtmd: one string with a mark, which is replaced by the pieces of a :class:`Picture`."""

    def __init__(self, template: Any, tokenizer: Any, image_processor: Any, picture: Picture, image_token_id: int, config: Any) -> None:
        self.template, self.tokenizer, self.image_processor = template, tokenizer, image_processor
        self.picture, self.image_token_id, self.config = picture, image_token_id, config
        begun, bos = tokenizer("")["input_ids"][:1], tokenizer.bos_token_id
        self.picture_ids = (image_token_id, *tokenizer.convert_tokens_to_ids(list(picture.inside)))
        self.begin = begun if bos is not None and begun == [bos] else []  # llama.cpp adds it and removes the template's own

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """As llama-server renders it: contents as strings, or as one typed part each if the template accepts nothing else."""
        marked = [(role, MARK + words if index == 0 else words) for index, (role, words) in enumerate(spoken)]
        for typed in (False, True):
            messages = [{"role": role, "content": [{"type": "text", "text": words}] if typed else words} for role, words in marked]
            text = self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, enable_thinking=True)
            if all(words.strip() in text for _, words in marked):
                return str(text)
        raise ValueError("it leaves out the message")

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """Tokenises each piece separately, as libmtmd does."""
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
        """Ids, and token types (all text) if the family has them."""
        types = {self.picture.types: torch.zeros_like(ids, dtype=torch.int32)} if self.picture.types else {}
        return {"input_ids": ids, **types}


class ProcessorImagePrompt:
    """For families that are not in the table: the text around a picture comes from transformers' AutoProcessor."""

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
    """For ``--language-model-only``: encodes texts, but no conversations about a picture."""

    picture_ids: tuple[int, ...] = ()

    def conversation(self, spoken: Spoken, opened: bool) -> str:
        """Raises ValueError: there are no conversations."""
        raise ValueError("a language model alone has no conversations")

    def __call__(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        raise ValueError("a language model alone takes no pictures")

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
    begin: tuple[int, ...] = ()  # tokens at the start of each text, if other than the tokenizer's bos_token

    @property
    def text_begin(self) -> tuple[int, ...]:
        """The tokens at the start of each text."""
        bos = self.tokenizer.bos_token_id
        return self.begin or (() if bos is None else (int(bos),))

    def encode(self, image: Path | Image.Image, turns: TextTurns) -> Encoded:
        """Encode a conversation about ``image``. An empty last answer leaves the prompt open, for generation."""
        opened = open_picture(image) if isinstance(image, Path) else image
        text = self._render(turns[:0], turns[0][0])
        try:
            inputs = self.image_prompt(text, opened)
        except Exception as error:  # bad settings can make an image processor raise anything
            name = image if isinstance(image, Path) else "a picture"
            raise UserError(
                f"the model's image processor cannot take {name} ({describe(error)}): "
                "check preprocessor_config.json and tokenizer_config.json"
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
        """Raise UserError if chat template, tokenizer or image processor fail on a small conversation."""
        encoded = self.encode(Image.new("RGB", CHECKED), [("What?", "This."), ("Where?", "There.")])
        if not encoded.vision.any():
            raise UserError("the model's chat template has no place for pictures: give the model the template of its family")

    def text_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Model inputs for token ids [texts, tokens] without any image."""
        return self.image_prompt.text_inputs(ids)

    def encode_text(self, ids: torch.Tensor) -> Encoded:
        """Encode a text of token ids [tokens], with neither picture nor answer."""
        none = torch.zeros(len(ids), dtype=torch.bool)
        return Encoded(self.text_inputs(ids[None]), none, none, none)

    def _answers(self, turns: TextTurns) -> tuple[list[int], list[bool], list[bool]]:
        """Ids after the first prompt (answer, end token, next question, next answer, ...), and masks of answer and header tokens."""
        ids: list[int] = []
        answers: list[bool] = []
        headers: list[bool] = []
        for index, (_, answer) in enumerate(turns):
            if not answer:
                break
            spoken = self._ids(answer)
            after = self._ids(self._between(turns, index))
            ended = len(spoken) + (1 if after and after[0] in self.end_ids else 0)
            last = index + 1 == len(turns)
            # The last turn stops at its end token: what the template writes after it is never generated.
            chunk = spoken + (after[: ended - len(spoken)] if last else after)
            opening = 0 if last else self._header(turns, index + 1, len(chunk) - ended)
            ids += chunk
            answers += [position < ended for position in range(len(chunk))]
            headers += [position >= len(chunk) - opening for position in range(len(chunk))]
        return ids, answers, headers

    def _header(self, turns: TextTurns, index: int, room: int) -> int:
        """The number of header tokens among the ``room`` tokens before answer ``index``: those that the template adds for generation, or
        the last token if the end of the question opens the answer. 0 if there is no answer."""
        if not turns[index][1]:
            return 0
        opened, closed = (self._ids(self._render(turns[:index], turns[index][0], opened=opened)) for opened in (True, False))
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opened, closed, strict=False)))
        return min(max(len(opened) - shared, 1), room)

    def _between(self, turns: TextTurns, index: int) -> str:
        """The text that the template writes between answer ``index`` and the next one, or the end of the conversation."""
        before = self._render(turns[:index], turns[index][0]) + turns[index][1]
        whole = self._render(turns[: index + 1], turns[index + 1][0] if index + 1 < len(turns) else None)
        if not whole.startswith(before):
            raise UserError(
                "the model's chat template rewrites answers, so their tokens cannot be located: give the model one that keeps them"
            )
        return whole[len(before) :]

    def _render(self, done: TextTurns, question: str | None, opened: bool = True) -> str:
        """The conversation so far and then ``question``, if any, with its answer ``opened``. The first question carries the image."""
        spoken = [words for turn in done for words in zip(("user", "assistant"), turn, strict=True)]
        spoken += [("user", question)] if question is not None else []
        try:
            return self.image_prompt.conversation(spoken, opened and question is not None)
        except Exception as error:  # templates are programs and can raise anything
            raise UserError(f"the model's chat template cannot be rendered ({describe(error)}): give the model one that renders") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
