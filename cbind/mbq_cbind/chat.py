"""Renders a question as the chat prompt of llama-server: the model's own template, with images first, each as one media marker."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mbq_cbind.errors import BindingError

QUESTION, ANSWER = "Which word?", "Thisword"  # to be found again in what a template writes


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template with the names of its special tokens ("" if there is none)."""

    source: str
    bos: str = ""
    eos: str = ""

    def prompt(self, question: str, *, marker: str = "", images: int = 0) -> str:
        """One user turn with ``images`` markers before ``question``, and the opening of the assistant's turn.

        llama-server joins a message's parts to one string before it renders them, without white space around markers, and hands templates
        that only take typed content a single text part; so does this. Raises BindingError if the template cannot be rendered.
        """
        return self._render([("user", marker * images + question)], opened=True).removeprefix(self.bos)  # the tokeniser adds BOS again

    def end_of_answer(self) -> str:
        """The text that the template writes after an assistant's message."""
        return self._render([("user", QUESTION), ("assistant", ANSWER)], opened=False).rpartition(ANSWER)[2]

    def _render(self, turns: list[tuple[str, str]], *, opened: bool) -> str:
        strings = [{"role": role, "content": words} for role, words in turns]
        parts = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in turns]
        try:
            template = _environment().from_string(self.source)
            for messages in (strings, parts):
                text = template.render(
                    messages=messages, add_generation_prompt=opened, bos_token=self.bos, eos_token=self.eos, enable_thinking=True
                )
                if all(words in text for _, words in turns):
                    return text
        except Exception as error:  # a template is a program and may raise anything
            raise BindingError(
                f"the model's chat template cannot be rendered ({error}): convert the model again with a template"
            ) from error
        raise BindingError("the model's chat template drops the user's words: convert the model again with a template that keeps them")


def _environment() -> jinja2.Environment:
    """A Jinja environment with the settings and extra names of transformers and llama.cpp."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
