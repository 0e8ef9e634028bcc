"""A language model that transformers has no class of, read as one that computes the same: settings, tensors, tokenizer.

For families whose language model converts alone: their checkpoints spell it otherwise, and the code of their directory does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UserError

QKV = "self_attn.{}_proj"  # for queries, keys and values in one matrix, in this order


@dataclass(frozen=True)
class TextModel:
    """``settings`` are those of transformers' ``model_type``.

    ``outside`` and ``inside`` say what transformers calls a module outside of the layers and in one, by its published name; published
    layers are ``layers`` and their number. What neither names is left out: tower, projector, what a picture's tokens alone pass.
    ``tokenizer`` makes transformers' tokenizer of a directory that has one of another kind, which llama.cpp cuts into words as ``pre``.
    ``asked`` are settings that llama.cpp's conversion of transformers' class asks for by published names. ``begin`` are the tokens that
    the authors' tokenizer puts before each text, where there is no bos_token.
    """

    model_type: str
    settings: Mapping[str, Any]
    outside: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]
    tokenizer: Callable[[Path], Any] | None = None
    pre: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    begin: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """transformers' class."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type])

    @property
    def configuration(self) -> Any:
        """transformers' configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, architectures=[self.architecture], **self.settings)

    def bare(self) -> Any:
        """transformers' model, without weights where the default device is torch's meta device."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(self.configuration)

    def names_of(self, name: str) -> list[str]:
        """What transformers calls the tensor that is published as ``name``: three of queries, keys and values, none of what is left out."""
        module, _, end = name.rpartition(".")
        if ours := self.outside.get(module):
            return [f"{ours}.{end}"]
        found = re.fullmatch(rf"{re.escape(self.layers)}(\d+)\.(.+)", module)
        ours = self.inside.get(found[2]) if found else None
        if found is None or ours is None:
            return []
        return [f"model.layers.{found[1]}.{ours.format(part)}.{end}" for part in ("qkv" if ours == QKV else " ")]

    def parts_of(self, name: str, tensor: Any) -> list[Any]:
        """The tensors of :meth:`names_of`, of the published one. Raises UserError where it has other rows than the settings say."""
        names = self.names_of(name)
        if len(names) > 1 and (not tensor.ndim or tensor.shape[0] != sum(self.rows)):
            raise UserError(f"{name} is {tuple(tensor.shape)} and config.json asks for {sum(self.rows)} rows: fetch the model again")
        return list(tensor.split(self.rows)) if len(names) > 1 else [tensor] * len(names)

    @property
    def rows(self) -> list[int]:
        """Rows of queries, keys and values."""
        width, heads, groups = (int(self.settings[key]) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        return [width, width // heads * groups, width // heads * groups]

    def respelled(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A published checkpoint's tensors under transformers' names."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            found |= zip(self.names_of(name), self.parts_of(name, tensor), strict=True)
        return found


def check_granted(published: Mapping[str, Any], granted: Mapping[str, Any]) -> None:
    """Raise UserError where the settings of a checkpoint are others than those ``granted`` ones that the class of transformers has."""
    for name, value in granted.items():
        if published.get(name, value) != value:
            raise UserError(f"the model's config.json has {name} {published[name]!r} and {value!r} is known here: use the published model")
