"""Layer by layer with bounded memory: what enters decoder layer 0 is captured once a sample, then one layer at a time is on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.packs import Apart, joined, packs
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import AnswerMask, Encoded


@dataclass
class Streamed:
    """One sample on the host between two decoder layers.

    ``hidden`` [1, tokens, width] is the input of the next layer, ``kwargs`` what the model hands to each layer beside it (rotary
    embeddings, mask), ``ids`` [tokens]. Bool [tokens]: ``vision``; ``answer``, the tokens that stand for the answer (Encoded.counted);
    ``labels``, the tokens that the loss is about: answers and their ends. ``salience`` [layers, groups, tokens] is there once the
    sensitivity is measured (see Sensitivity).
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    ids: torch.Tensor
    vision: torch.Tensor
    answer: torch.Tensor
    labels: torch.Tensor
    salience: torch.Tensor | None = None

    @property
    def prompt(self) -> torch.Tensor:
        """Tokens that are neither vision nor answer."""
        return ~(self.vision | self.answer)


def capture(loaded: LoadedModel, samples: Iterable[Sample], answer_mask: AnswerMask = "header") -> Iterator[Streamed]:
    """Run vision tower and embeddings for each sample, and stop at the door of decoder layer 0."""
    for sample in samples:
        yield capture_encoded(loaded, loaded.encode(sample.image, list(sample.turns)), answer_mask)


@torch.no_grad()
def capture_encoded(loaded: LoadedModel, encoded: Encoded, answer_mask: AnswerMask = "header") -> Streamed:
    """The state of one encoded conversation at the door of decoder layer 0."""
    decoder = loaded.decoder
    doors = nn.ModuleList([_Door() for _ in decoder.layers])
    decoder.module.layers = doors
    try:
        loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    finally:
        decoder.module.layers = decoder.layers
    seen: dict[int, torch.Tensor] = {}
    kwargs = [_to_host(door.kwargs, seen) for door in doors if isinstance(door, _Door)]
    first = doors[0]
    assert isinstance(first, _Door)
    assert first.hidden is not None
    return Streamed(first.hidden.cpu(), kwargs, encoded.ids.cpu(), encoded.vision, encoded.counted(answer_mask), encoded.answer)


class _Door(nn.Module):
    """Stands where a decoder layer was, keeps what it is given and lets the hidden states through."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


def _to_host(value: Any, seen: dict[int, torch.Tensor]) -> Any:
    """``value`` with its tensors on the host; a tensor that many layers share is kept once (``seen`` by identity)."""
    if isinstance(value, torch.Tensor):
        return seen.setdefault(id(value), value.cpu())
    if isinstance(value, dict):
        return {key: _to_host(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item, seen) for item in value)
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def working_layer(loaded: LoadedModel, index: int) -> nn.Module:
    """A copy of decoder layer ``index`` on the device in the computing dtype; the stored layer stays as it is."""
    return copy.deepcopy(loaded.decoder.layers[index]).to(device=loaded.device, dtype=loaded.dtype)


def run_layer(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Output [1, tokens, width] of a decoder layer; everything on the layer's device."""
    out = layer(hidden, **kwargs)
    result = out[0] if isinstance(out, tuple) else out
    assert isinstance(result, torch.Tensor)
    return result


def run_pack(layer: nn.Module, index: int, pack: Sequence[Streamed]) -> torch.Tensor:
    """Output [1, tokens, width] of decoder layer ``index``, on its device, for one of :func:`packs`."""
    device = next(layer.parameters()).device
    hidden, kwargs = joined(pack, index)
    with Apart([stream.hidden.shape[1] for stream in pack]) if len(pack) > 1 else nullcontext():
        return run_layer(layer, hidden.to(device), to_device(kwargs, device))


def unpack(pack: Sequence[Streamed], hidden: torch.Tensor) -> None:
    """Give each stream of ``pack`` its part of ``hidden`` [1, tokens, width]."""
    parts = torch.split(hidden.to(pack[0].hidden.device), [stream.hidden.shape[1] for stream in pack], dim=1)
    for stream, part in zip(pack, parts, strict=True):
        stream.hidden = part


@torch.no_grad()
def advance(layer: nn.Module, index: int, streams: Sequence[Streamed]) -> None:
    """Send every stream through ``layer``, in place: ``hidden`` becomes the input of layer ``index + 1``."""
    for pack in packs(streams, index):
        unpack(pack, run_pack(layer, index, pack))


def logits(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] of the last layer's output, on the device."""
    decoder = loaded.decoder
    out = decoder.head(decoder.norm(hidden.to(device=loaded.device)))
    assert isinstance(out, torch.Tensor)
    return out
