"""Reads a language model that transformers has no class for as another class that computes the same: settings, tensors, tokenizer.

For families of which only the language model is converted. Their checkpoints use other names, and the code in their directory is not run.
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
    """How to read a published language model as transformers' ``model_type`` with ``settings``.

    ``outside`` and ``inside`` map published module names, outside of the layers and within one, to transformers' names; published layers
    are called ``layers`` plus their number. Modules in neither map are left out: tower, projector, matrices for picture tokens only.
    ``tokenizer`` makes transformers' tokenizer from a directory that has another kind; ``pre`` is llama.cpp's name of its pre-tokenizer.
    ``asked``: settings that llama.cpp's conversion of transformers' class looks up under published names. ``begin``: the tokens that the
    authors' tokenizer puts before each text, if there is no bos_token.
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
        """The name of transformers' class."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type])

    @property
    def configuration(self) -> Any:
        """The transformers configuration object."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, architectures=[self.architecture], **self.settings)

    def empty_model(self) -> Any:
        """The transformers model; without weights if the default device is torch's meta device."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(self.configuration)

    def names_of(self, name: str) -> list[str]:
        """transformers' names of the tensor published as ``name``: three for a fused qkv, none for what is left out."""
        module, _, end = name.rpartition(".")
        if ours := self.outside.get(module):
            return [f"{ours}.{end}"]
        found = re.fullmatch(rf"{re.escape(self.layers)}(\d+)\.(.+)", module)
        ours = self.inside.get(found[2]) if found else None
        if found is None or ours is None:
            return []
        return [f"model.layers.{found[1]}.{ours.format(part)}.{end}" for part in ("qkv" if ours == QKV else " ")]

    def parts_of(self, name: str, tensor: Any) -> list[Any]:
        """The tensors of :meth:`names_of`, split from the published one. Raises UserError if its rows do not match the settings."""
        names = self.names_of(name)
        if len(names) > 1 and (not tensor.ndim or tensor.shape[0] != sum(self.rows)):
            raise UserError(f"{name} is {tuple(tensor.shape)} and config.json asks for {sum(self.rows)} rows: download the model again")
        return list(tensor.split(self.rows)) if len(names) > 1 else [tensor] * len(names)

    @property
    def rows(self) -> list[int]:
        """The number of rows of queries, keys and values."""
        width, heads, groups = (int(self.settings[key]) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        return [width, width // heads * groups, width // heads * groups]

    def rename_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A published checkpoint's tensors, renamed to transformers' names."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            found |= zip(self.names_of(name), self.parts_of(name, tensor), strict=True)
        return found


def check_assumed(published: Mapping[str, Any], assumed: Mapping[str, Any]) -> None:
    """Raise UserError if a checkpoint's settings differ from the ``assumed`` ones, which transformers' class has built in."""
    for name, value in assumed.items():
        if published.get(name, value) != value:
            raise UserError(
                f"the model's config.json has {name} {published[name]!r} and only {value!r} is supported: use the published model"
            )
