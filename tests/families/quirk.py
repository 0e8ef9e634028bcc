"""Family-specific features, each as a change to the model, its settings or its inputs that ignores the feature: the kinds of change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pytest
import torch
from mbq_gguf.calibration.stream import takes_others
from published import by_key_head
from small import Small
from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]  # a forward hook: module, its arguments, its output to another output


class Quirk(Protocol):
    """``name`` says which; within ``ignored`` the small model runs without it."""

    @property
    def name(self) -> str: ...

    def ignored(self, small: Small) -> Any: ...


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there within the block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class Module:
    """What modules whose names match ``name`` give is changed by ``hook``."""

    name: str
    hook: Hook

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        found = [module for name, module in small.loaded.model.named_modules() if re.fullmatch(rf"(?:model\.)?{self.name}", name)]
        assert found, self.name
        with hooked(module.register_forward_hook(self.hook) for module in found):
            yield


@dataclass(frozen=True)
class Held:
    """Parameters and buffers whose names end so are ``value`` everywhere, or what it makes of them."""

    name: str
    value: float | Callable[[torch.Tensor], torch.Tensor]

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        model = small.loaded.model
        found = [tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if name.endswith(self.name)]
        assert found, self.name
        kept = [tensor.detach().clone() for tensor in found]
        try:
            for tensor in found:
                tensor.copy_(self.value(tensor) if callable(self.value) else torch.full_like(tensor, self.value))
            yield
        finally:
            for tensor, before in zip(found, kept, strict=True):
                tensor.copy_(before)


@dataclass(frozen=True)
class Setting:
    """A setting of the language model is another."""

    name: str
    value: object

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        config = small.loaded.config.text_config
        kept = getattr(config, self.name)
        setattr(config, self.name, self.value)
        try:
            yield
        finally:
            setattr(config, self.name, kept)


@dataclass(frozen=True)
class Attribute:
    """``attribute`` of modules whose names match ``name`` is ``value``."""

    name: str
    attribute: str
    value: object

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        found = [module for name, module in small.loaded.model.named_modules() if re.fullmatch(self.name, name)]
        assert found, self.name
        with pytest.MonkeyPatch.context() as patch:
            for module in found:
                patch.setattr(module, self.attribute, self.value)
            yield


@dataclass(frozen=True)
class Patched:
    """Within ``where`` a function called ``name`` is ``other``, which gets what it was first."""

    name: str
    where: Callable[[Small], Any]
    other: Callable[..., Any]

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        holder = self.where(small)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, self.name, partial(self.other, getattr(holder, self.name)))
            yield


@dataclass(frozen=True)
class Input:
    """An input is zero everywhere."""

    name: str

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        inputs = small.encoded.inputs
        kept = inputs[self.name]
        inputs[self.name] = torch.zeros_like(kept)
        try:
            yield
        finally:
            inputs[self.name] = kept


@dataclass(frozen=True)
class OthersKeys:
    """Layers that take the keys and values of others take some that say nothing."""

    name: str = "keys and values of other layers"

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = {kind: tuple(torch.zeros_like(part) for part in pair) for kind, pair in kwargs["shared_kv_states"].items()}
            return args, kwargs | {"shared_kv_states": given}

        found = [layer.self_attn for layer in small.loaded.decoder.layers if takes_others(layer)]
        assert found
        with hooked(module.register_forward_pre_hook(hook, with_kwargs=True) for module in found):
            yield


@dataclass(frozen=True)
class Ungrouped:
    """A matrix of queries, keys and values by key head is taken for all queries, then all keys, then all values."""

    name: str = "q, k and v by key head"

    @contextmanager
    def ignored(self, small: Small) -> Iterator[None]:
        layers = [[getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv"] for layer in small.loaded.decoder.layers]
        kept = [[weight.clone() for weight in weights] for weights in layers]
        try:
            for weights in layers:
                merged = by_key_head(weights, small.loaded.config.text_config.num_key_value_heads)
                for weight, rows in zip(weights, merged.split([len(weight) for weight in weights]), strict=True):
                    weight.copy_(rows)
            yield
        finally:
            for weights, before in zip(layers, kept, strict=True):
                for weight, rows in zip(weights, before, strict=True):
                    weight.copy_(rows)
