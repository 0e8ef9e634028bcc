"""Runs the model layer by layer: captures the inputs of decoder layer 0 once per sample, then has one layer at a time on the device."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import nn

from mbq_gguf.calibration.apart import Apart
from mbq_gguf.calibration.batches import SHARED, batches, joined
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.spill import kept
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.lazy import Staged, materialise
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import AnswerMask, Encoded
from mbq_gguf.parallel import Parts, parallel_map, parallel_map_values
from mbq_gguf.threads import Workers

Piece = TypeVar("Piece")

HANDED = "handed "  # prefix of the names of keys and values among the parts of a batch


def capture(loaded: LoadedModel, samples: Sequence[Sample], answer_mask: AnswerMask = "header", workers: int = 1) -> Iterator[Streamed]:
    """Run vision tower and embeddings for each sample, and stop before decoder layer 0; see :func:`capture_each`."""
    yield from capture_each(loaded, samples, lambda sample: loaded.encode(sample.image, list(sample.turns)), answer_mask, workers)


def capture_each(
    loaded: LoadedModel, pieces: Sequence[Piece], encode: Callable[[Piece], Encoded], answer_mask: AnswerMask = "header", workers: int = 1
) -> Iterator[Streamed]:
    """The state before decoder layer 0 for each of ``pieces``, after ``encode``, in order.

    ``workers`` run the model in parallel while the caller encodes the next piece, if there is only one process: the products for one
    picture are too small to share.
    """
    if workers == 1:
        yield from parallel_map_values(pieces, lambda piece: capture_encoded(loaded, encode(piece), answer_mask))
        return
    with Workers([loaded.twin() for _ in range(workers)]) as twins:
        yield from twins.each(map(encode, pieces), lambda twin, encoded: capture_encoded(twin, encoded, answer_mask))


@torch.no_grad()
def capture_encoded(loaded: LoadedModel, encoded: Encoded, answer_mask: AnswerMask = "header") -> Streamed:
    """The state of one encoded conversation before decoder layer 0."""
    decoder = loaded.decoder
    last = len(decoder.layers) - 1
    catchers = nn.ModuleList([_Catcher(index == 0, index == last) for index in range(last + 1)])
    decoder.module.layers = catchers
    try:
        # for one token, given by its position: given a number, Gemma 4 drops the other tokens in its last layers
        with suppress(_CaughtError):
            loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=torch.tensor([-1], device=loaded.device))
    finally:
        decoder.module.layers = decoder.layers
    caught = [catcher for catcher in catchers if isinstance(catcher, _Catcher)]
    first, *added = (catcher.hidden for catcher in caught)
    assert first is not None
    return Streamed(
        kept(first),
        _arguments(caught),
        encoded.ids.cpu(),
        encoded.vision,
        encoded.counted(answer_mask),
        encoded.answer,
        alone=frozenset(index for index, layer in enumerate(decoder.layers) if decoder.layout.of(layer).alone),
        added={index: kept(hidden) for index, hidden in enumerate(added, start=1) if hidden is not None},
        handed={} if any(takes_others(layer) for layer in decoder.layers) else None,
    )


def takes_others(layer: nn.Module) -> bool:
    """Whether ``layer`` has no keys and values of its own and uses those of an earlier layer."""
    return bool(getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False))


class _CaughtError(Exception):
    """Ends the model's run after its last layer. The head's product for one token reads the weights of a large vocabulary, 7 of the 17 ms
    that a text of the reference VLM takes.
    """


class _Catcher(nn.Module):
    """Replaces a decoder layer and keeps its input. Its output is zero, so the next one sees only what is added in between.

    ``hidden`` is None if nothing is added. ``own`` is the layer's per-token input (Gemma 4's small models), or None.
    """

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.hidden: torch.Tensor | None = None
        self.own: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, per_layer_input: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.own, self.kwargs = hidden_states if self.first or hidden_states.any() else None, per_layer_input, kwargs
        if self.last:
            raise _CaughtError
        return torch.zeros_like(hidden_states)


def _arguments(caught: Sequence[_Catcher]) -> list[dict[str, Any]]:
    """The arguments of each layer besides the residual stream, at a place where they can stay."""
    seen: dict[int, torch.Tensor] = {}
    kwargs = [_kept(catcher.kwargs, seen) for catcher in caught]
    own = [catcher.own for catcher in caught if catcher.own is not None]
    if own:  # as one tensor, which is large enough for a file if memory ends
        for given, part in zip(kwargs, kept(torch.stack(own)), strict=True):
            given["per_layer_input"] = part
    return kwargs


def _kept(value: Any, seen: dict[int, torch.Tensor]) -> Any:
    """``value`` with its tensors at a place where they can stay; a tensor shared by several layers is kept once (``seen`` by identity)."""
    if isinstance(value, torch.Tensor):
        return seen.setdefault(id(value), kept(value))
    if isinstance(value, UserDict):  # what layers pass to later ones (Gemma 4): empty here
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


def working_layer(loaded: LoadedModel, index: int, staged: Staged | None = None) -> Layer:
    """A copy of decoder layer ``index`` on the device in the computing dtype, read from its files, or from what is ``staged`` of it,
    which is released. The stored layer does not change.
    """
    module = copy.deepcopy(loaded.decoder.layers[index])  # tensors that are still in files stay there
    materialise(module, loaded.device, loaded.dtype, staged=staged)
    return Layer(module, index, loaded.decoder.layout.of(module))


def run_batch(layer: Layer, batch: Sequence[Streamed], handed: Parts | None = None) -> torch.Tensor:
    """The output [1, tokens, width] of ``layer``, on its device, for one of :func:`batches`.

    Keys and values that the layer passes to later layers are put into ``handed``, even if a hook ends the run after them.
    """
    hidden, kwargs = joined(batch, layer.index)
    kwargs = to_device(kwargs, layer.device)
    with Apart([stream.hidden.shape[1] for stream in batch]) if len(batch) > 1 else nullcontext():
        try:
            return layer.run(hidden.to(layer.device), kwargs)
        finally:
            if handed is not None and batch[0].handed is not None:
                handed |= {f"{HANDED}{kind}": pair for kind, pair in handed_on(kwargs).items()}


def handed_on(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Keys and values [2, ...] by kind that a layer has put into its arguments; those that it was given are already one tensor per kind."""
    return {kind: torch.stack(pair) for kind, pair in kwargs.get(SHARED, {}).items() if isinstance(pair, tuple)}


def pass_batch(layer: Layer, batch: Sequence[Streamed]) -> Parts:
    """The output of ``layer`` for one of :func:`batches`, for :func:`split_back`."""
    handed: Parts = {}
    return {"hidden": run_batch(layer, batch, handed), **handed}


def split_back(batch: Sequence[Streamed], parts: Parts) -> None:
    """Give each stream of ``batch`` its part of ``hidden`` [1, tokens, width], and of keys and values for later layers."""
    lengths = [stream.hidden.shape[1] for stream in batch]
    for stream, part in zip(batch, torch.split(kept(parts["hidden"]), lengths, dim=1), strict=True):
        stream.hidden = part
    for name in (name for name in parts if name.startswith(HANDED)):
        for stream, part in zip(batch, torch.split(kept(parts[name]), lengths, dim=-2), strict=True):
            stream.handed = {**(stream.handed or {}), name.removeprefix(HANDED): part}


@torch.no_grad()
def advance(layer: Layer, streams: Sequence[Streamed]) -> None:
    """Run every stream through ``layer``, in place: ``hidden`` becomes the input of the next layer."""
    for batch, parts in parallel_map(list(batches(streams, layer)), lambda batch: pass_batch(layer, batch)):
        split_back(batch, parts)


def logits(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] for the last layer's output, on the device."""
    decoder = loaded.decoder
    out = decoder.head(decoder.norm(hidden.to(device=loaded.device)))
    assert isinstance(out, torch.Tensor)
    cap = getattr(loaded.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(out / cap) * cap if cap else out
