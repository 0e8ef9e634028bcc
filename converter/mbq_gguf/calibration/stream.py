"""Layer by layer with bounded memory: what enters decoder layer 0 is captured once a sample, then one layer at a time is on the device."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from mbq_gguf.calibration.batches import Apart, batches, joined
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.spill import kept
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import AnswerMask, Encoded
from mbq_gguf.models.stored import read_into
from mbq_gguf.parallel import spread, spread_values


def capture(loaded: LoadedModel, samples: Iterable[Sample], answer_mask: AnswerMask = "header") -> Iterator[Streamed]:
    """Run vision tower and embeddings for each sample, and stop before decoder layer 0."""

    def captured(sample: Sample) -> Streamed:
        return capture_encoded(loaded, loaded.encode(sample.image, list(sample.turns)), answer_mask)

    yield from spread_values(list(samples), captured)


@torch.no_grad()
def capture_encoded(loaded: LoadedModel, encoded: Encoded, answer_mask: AnswerMask = "header") -> Streamed:
    """The state of one encoded conversation before decoder layer 0."""
    decoder = loaded.decoder
    catchers = nn.ModuleList([_Catcher(index == 0) for index in range(len(decoder.layers))])
    decoder.module.layers = catchers
    try:
        loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    finally:
        decoder.module.layers = decoder.layers
    seen: dict[int, torch.Tensor] = {}
    kwargs = [_kept(catcher.kwargs, seen) for catcher in catchers if isinstance(catcher, _Catcher)]
    first, *added = (catcher.hidden for catcher in catchers if isinstance(catcher, _Catcher))
    assert first is not None
    return Streamed(
        kept(first),
        kwargs,
        encoded.ids.cpu(),
        encoded.vision,
        encoded.counted(answer_mask),
        encoded.answer,
        alone=frozenset(index for index, layer in enumerate(decoder.layers) if decoder.layout.of(layer).alone),
        added={index: kept(hidden) for index, hidden in enumerate(added, start=1) if hidden is not None},
    )


class _Catcher(nn.Module):
    """Stands where a decoder layer was and keeps what it is given; what it gives is zero, so that the next one sees what is added.

    ``hidden`` is None where nothing is. Families may have a second argument, which is None in what is supported.
    """

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.hidden: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, *_none: None, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.kwargs = hidden_states if self.first or hidden_states.any() else None, kwargs
        return torch.zeros_like(hidden_states)


def _kept(value: Any, seen: dict[int, torch.Tensor]) -> Any:
    """``value`` with its tensors where they can wait; a tensor that many layers share is kept once (``seen`` by identity)."""
    if isinstance(value, torch.Tensor):
        return seen.setdefault(id(value), kept(value))
    if isinstance(value, UserDict):  # what layers hand on to later ones (Gemma 4), of which those that are supported take nothing
        return {}
    if isinstance(value, dict):
        return {key: _kept(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(item, seen) for item in value)
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


def working_layer(loaded: LoadedModel, index: int) -> Layer:
    """A copy of decoder layer ``index`` on the device in the computing dtype, read from its files; the stored layer stays as it is."""
    module = copy.deepcopy(loaded.decoder.layers[index])  # of what is still in files, only that it is
    read_into(module, loaded.device, loaded.dtype)
    return Layer(module, index, loaded.decoder.layout.of(module))


def run_batch(layer: Layer, batch: Sequence[Streamed]) -> torch.Tensor:
    """Output [1, tokens, width] of ``layer``, on its device, for one of :func:`batches`."""
    hidden, kwargs = joined(batch, layer.index)
    with Apart([stream.hidden.shape[1] for stream in batch]) if len(batch) > 1 else nullcontext():
        return layer.run(hidden.to(layer.device), to_device(kwargs, layer.device))


def split_back(batch: Sequence[Streamed], hidden: torch.Tensor) -> None:
    """Give each stream of ``batch`` its part of ``hidden`` [1, tokens, width]."""
    parts = torch.split(kept(hidden), [stream.hidden.shape[1] for stream in batch], dim=1)
    for stream, part in zip(batch, parts, strict=True):
        stream.hidden = part


@torch.no_grad()
def advance(layer: Layer, streams: Sequence[Streamed]) -> None:
    """Send every stream through ``layer``, in place: ``hidden`` becomes the input of the next layer."""
    for batch, parts in spread(list(batches(streams, layer.index)), lambda batch: {"hidden": run_batch(layer, batch)}):
        split_back(batch, parts["hidden"])


def logits(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] of the last layer's output, on the device."""
    decoder = loaded.decoder
    out = decoder.head(decoder.norm(hidden.to(device=loaded.device)))
    assert isinstance(out, torch.Tensor)
    cap = getattr(loaded.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(out / cap) * cap if cap else out
