"""A VLM that is loaded for calibration."""

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
from mbq_gguf.models.lazy import materialise, set_tensor, tensors_of
from mbq_gguf.models.prompts import Encoded, Prompts


@dataclass
class LoadedModel:
    """The transformers model and what the converter needs to know about it.

    Decoder layers stay in the checkpoint's files (models/lazy.py); calibration reads them one at a time, to ``device`` and ``dtype``.
    Everything else (vision tower, projector, embeddings, final norm, head) is already on ``device`` in ``dtype``.
    """

    directory: Path
    architecture: str
    model: nn.Module
    decoder: Decoder
    prompts: Prompts
    device: torch.device
    dtype: torch.dtype
    # Owner, name and lazy value of everything but the decoder layers.
    in_files: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)

    def encode(self, image: Path | Image.Image, turns: list[tuple[str, str]]) -> Encoded:
        """Model inputs for a conversation about ``image``; ``turns`` are (question, answer) pairs. An empty last answer stays open."""
        return self._placed(self.prompts.encode(image, turns))

    def encode_text(self, ids: torch.Tensor) -> Encoded:
        """Model inputs for a text given as token ids [tokens]."""
        return self._placed(self.prompts.encode_text(ids))

    def _placed(self, encoded: Encoded) -> Encoded:
        for name, value in encoded.inputs.items():
            value = value.to(self.device)
            encoded.inputs[name] = value.to(self.dtype) if value.is_floating_point() else value
        return encoded

    def twin(self) -> LoadedModel:
        """A copy with its own modules that shares all tensors, so that two threads can run the model: Qwen2-VL's modules keep state of the
        latest call."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        shared = {id(each): each for each in (*tensors, self.decoder.layout)}
        model, decoder = copy.deepcopy((self.model, self.decoder), shared)
        return replace(self, model=model, decoder=decoder)

    def hold(self, dtype: torch.dtype | None = None) -> None:
        """Read all decoder layers, to ``device`` and ``dtype`` (None: as stored), to run the whole model."""
        for layer in self.decoder.layers:
            materialise(layer, self.device, dtype)

    @contextmanager
    def whole(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Hold all decoder layers in the block, then return them to their files."""
        before = list(tensors_of(self.decoder.layers))
        try:
            self.hold(dtype)
            yield
        finally:
            for owner, name, value in before:
                set_tensor(owner, name, value)

    @contextmanager
    def layers_alone(self) -> Iterator[None]:
        """Keep only decoder layers on a GPU in the block; the rest of the model is released, and read again afterwards."""
        if self.device.type == "cpu":
            yield
            return
        for owner, name, value in self.in_files:
            set_tensor(owner, name, value)
        yield
        materialise(self.model, self.device, self.dtype, left=[self.decoder.layers])

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight."""
        return self.decoder.head.weight is self.decoder.embed_tokens.weight

    @property
    def config(self) -> Any:
        """The transformers configuration object."""
        return self.model.config
