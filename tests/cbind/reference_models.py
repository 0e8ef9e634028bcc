"""What the fixtures hand to the tests: a pair of GGUF files, and the same model in Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from mbq_gguf.evaluate.exact_match import Question
from mbq_gguf.models import LoadedModel


@dataclass(frozen=True)
class Files:
    text: Path
    mmproj: Path


@dataclass(frozen=True)
class HuggingFace:
    """The model in float32."""

    loaded: LoadedModel

    def tokens(self, question: Question) -> tuple[list[int], list[int]]:
        """Prompt, image tokens and all, and answer with the token that ends it."""
        encoded = self.loaded.encode(question.image, [(question.question, question.expected)])
        ids = encoded.ids.tolist()
        answer = int(encoded.answer.sum())
        return ids[:-answer], ids[-answer:]

    def logits(self, question: Question) -> npt.NDArray[np.float32]:
        """Row i predicts answer token i."""
        encoded = self.loaded.encode(question.image, [(question.question, question.expected)])
        answer = int(encoded.answer.sum())
        with torch.inference_mode():
            logits: torch.Tensor = self.loaded.model(**encoded.inputs, logits_to_keep=answer + 1).logits[0, :-1]
        return logits.numpy()
