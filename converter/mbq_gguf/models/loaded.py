"""A VLM ready for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mbq_gguf.models.decoder import Decoder
from mbq_gguf.models.prompts import Encoded, Prompts


@dataclass
class LoadedModel:
    """The transformers model with what the converter must know about it.

    Decoder layers keep the stored dtype and stay on the host; calibration copies one at a time to ``device`` in ``dtype``. Everything
    else (vision tower, projector, embeddings, final norm, head) is on ``device`` in ``dtype`` already.
    """

    directory: Path
    architecture: str
    model: nn.Module
    decoder: Decoder
    prompts: Prompts
    device: torch.device
    dtype: torch.dtype

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

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight."""
        return self.decoder.head.weight is self.decoder.embed_tokens.weight

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config
