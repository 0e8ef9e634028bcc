"""A question as the chat prompt that llama-server would send: the model's own template, images first, each as one media marker."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mbq_gguf.errors import UserError


def render(template: str, question: str, *, marker: str, images: int, bos: str = "", eos: str = "") -> str:
    """One user turn with ``images`` markers before ``question``, and the opening of the assistant's turn.

    llama-server joins a message's parts to one string before it renders them, without white space around markers, and hands templates that
    only take typed content a single text part; so does this. Raises UserError where the template cannot be rendered.
    """
    content = marker * images + question
    try:
        compiled = _environment().from_string(template)
        text = _apply(compiled, content, bos, eos)
        if content not in text:
            text = _apply(compiled, [{"type": "text", "text": content}], bos, eos)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template cannot be rendered ({error}): convert the model again with a template") from error
    if content not in text:
        raise UserError("the model's chat template drops the user's words: convert the model again with a template that keeps them")
    return text.removeprefix(bos) if bos else text  # the tokeniser adds it again


def _apply(template: jinja2.Template, content: str | list[dict[str, str]], bos: str, eos: str) -> str:
    messages = [{"role": "user", "content": content}]
    return template.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, enable_thinking=True)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it: transformers' and llama.cpp's settings and extra names."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
