"""A VLM ready for calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mbq_gguf.models.decoder import Decoder
from mbq_gguf.models.prompts import Encoded, Prompts
from mbq_gguf.models.stored import put, read_into, tensors_of


@dataclass
class LoadedModel:
    """The transformers model with what the converter must know about it.

    Decoder layers stay in the checkpoint's files (models/stored.py); calibration reads one at a time, to ``device`` and ``dtype``.
    Everything else (vision tower, projector, embeddings, final norm, head) is on ``device`` in ``dtype`` already.
    """

    directory: Path
    architecture: str
    model: nn.Module
    decoder: Decoder
    prompts: Prompts
    device: torch.device
    dtype: torch.dtype
    in_files: list[tuple[nn.Module, str, torch.Tensor]] = field(
        default_factory=list
    )  # owner, name and stored value of that everything else

    def encode(self, image: Path | Image.Image, turns: list[tuple[str, str]]) -> Encoded:
        """Model inputs of a conversation about ``image``; ``turns`` are (question, answer), an empty last answer is left open."""
        return self._placed(self.prompts.encode(image, turns))

    def encode_text(self, ids: torch.Tensor) -> Encoded:
        """Model inputs of a text of token ids [tokens]."""
        return self._placed(self.prompts.encode_text(ids))

    def _placed(self, encoded: Encoded) -> Encoded:
        for name, value in encoded.inputs.items():
            value = value.to(self.device)
            encoded.inputs[name] = value.to(self.dtype) if value.is_floating_point() else value
        return encoded

    def twin(self) -> LoadedModel:
        """The same model in modules of its own over the same tensors: two threads can run it at a time, since Qwen2-VL's modules remember
        what the latest call was about."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        shared = {id(each): each for each in (*tensors, self.decoder.layout)}
        model, decoder = copy.deepcopy((self.model, self.decoder), shared)
        return replace(self, model=model, decoder=decoder)

    def hold(self, dtype: torch.dtype | None = None) -> None:
        """Read all decoder layers, to ``device`` and ``dtype`` (None: as stored), for who runs the whole model."""
        for layer in self.decoder.layers:
            read_into(layer, self.device, dtype)

    @contextmanager
    def whole(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """While open, all decoder layers are held so."""
        before = list(tensors_of(self.decoder.layers))
        try:
            self.hold(dtype)
            yield
        finally:
            for owner, name, value in before:
                put(owner, name, value)

    @contextmanager
    def layers_alone(self) -> Iterator[None]:
        """While open, a card holds nothing of the model but what is read of decoder layers; the rest is read again behind it."""
        if self.device.type == "cpu":
            yield
            return
        for owner, name, value in self.in_files:
            put(owner, name, value)
        yield
        read_into(self.model, self.device, self.dtype, left=[self.decoder.layers])

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight."""
        return self.decoder.head.weight is self.decoder.embed_tokens.weight

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config
