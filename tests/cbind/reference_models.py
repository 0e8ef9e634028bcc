"""Types of the fixtures: a pair of GGUF files, and the same model in Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from mbq_gguf.evaluate.exact_match import Question
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quantised import QuantisedTensor
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

    @contextmanager
    def weights(self, quantised: Mapping[str, QuantisedTensor]) -> Iterator[None]:
        """Within the block, the decoder has these weights, unpacked."""
        parameters = dict(self.loaded.decoder.module.named_parameters())
        before = {key: parameters[key].data for key in quantised}
        for key, tensor in quantised.items():
            parameters[key].data = torch.from_numpy(OWN[tensor.type_name].dequantize(tensor.data))
        try:
            yield
        finally:
            for key, data in before.items():
                parameters[key].data = data

    @contextmanager
    def rounded_activations(self, keys: Iterable[str]) -> Iterator[None]:
        """Within the block, the inputs of these decoder linears are rounded as ggml rounds them before it meets MBQ3 weights."""
        modules = dict(self.loaded.decoder.module.named_modules())
        hooks = [modules[key.removesuffix(".weight")].register_forward_pre_hook(_round_inputs) for key in keys]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _round_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Q8_1: int8 codes in blocks of 32 whose step, max |x| / 127, is stored in fp16."""
    blocks = inputs[0].reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.where(step > 0, (blocks / step).round(), 0.0)
    return ((codes * step.half().float()).reshape(inputs[0].shape),)
