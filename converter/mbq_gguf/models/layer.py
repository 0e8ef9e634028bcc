"""One decoder layer: its module, its index and its layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mbq_gguf.models.experts import Experts
from mbq_gguf.models.layout import Layout, Site

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class StopForward(Exception):
    """Raised by a hook to stop a forward pass as soon as the wanted value is there."""


@dataclass(frozen=True)
class Layer:
    """Decoder layer ``index``, usually a working copy on the device; ``layout`` describes ``module``."""

    module: nn.Module
    index: int
    layout: Layout

    @property
    def sites(self) -> tuple[Site, ...]:
        """The activations that matrices read, in order of computation."""
        return self.layout.sites

    @property
    def device(self) -> torch.device:
        """The device of the layer's parameters."""
        return next(self.module.parameters()).device

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        value = self.part(self.layout.branches[0].module).head_dim
        assert isinstance(value, int)
        return value

    def part(self, name: str) -> nn.Module:
        """The module called ``name``."""
        return self.module.get_submodule(name)

    @property
    def experts(self) -> Experts | None:
        """The layer's experts, or None."""
        found = self.part(self.layout.experts) if self.layout.experts else None
        assert found is None or isinstance(found, Experts)
        return found

    def row_weights(self, site: Site, weights: torch.Tensor) -> torch.Tensor:
        """The weight of each row of the input of ``site`` in the latest run [rows], given the weight of each token [tokens]."""
        if site.expert is None or self.experts is None:
            return weights
        return weights[self.experts.rows[site.expert]] * self.experts.weights[site.expert]

    def linear(self, name: str) -> nn.Linear:
        """The linear called ``name``, for its weight and bias.

        For a reader that is part of a fused linear, this is a view: a linear over the same memory, so that writing to it changes the layer.
        The layer does not run this view, so register hooks on :meth:`holder`.
        """
        module, fused = self.holder(name), self.layout.fused_of(name)
        return _rows_of(module, fused.rows(self.module)[name]) if fused else module

    def holder(self, name: str) -> nn.Linear:
        """The linear that the layer runs for reader ``name``: the reader itself, or the fused linear that contains it."""
        module = self.part(self.layout.linear_of(name))
        assert isinstance(module, nn.Linear)
        return module

    def narrow_writer(self, site: Site) -> nn.Linear | None:
        """The only linear that reads ``site``, if it writes to the residual stream and has fewer outputs than inputs (down_proj); else
        None."""
        name = site.readers[0]
        if len(site.readers) > 1 or name not in {branch.writer for branch in self.layout.branches} or self.layout.fused_of(name):
            return None
        linear = self.holder(name)
        return linear if linear.out_features < linear.in_features else None

    def outputs(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The channels of reader ``name`` in ``values`` [..., channels], the output of its holder."""
        fused = self.layout.fused_of(name)
        return values[..., fused.rows(self.module)[name]] if fused else values

    def parameters_with(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The module parameters, by name, that change when readers get ``weights``; other rows of a fused linear keep theirs."""
        all_weights = {name: weights[name] if name in weights else self.linear(name).weight for name in self.layout.readers}
        changed = {self.layout.linear_of(name) for name in weights}
        by_linear = self.layout.by_linear(all_weights)
        return {f"{name}.weight": torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in by_linear.items() if name in changed}

    def absorber(self, site: Site) -> nn.Module:
        """The module that absorbs the inverse channel factors of a foldable ``site``; a linear as from :meth:`linear`."""
        assert site.absorber is not None
        return self.linear(site.absorber) if site.absorber in self.layout.readers else self.part(site.absorber)

    def twin(self) -> Layer:
        """A copy with its own modules that shares all tensors, so that two threads can run the layer, each with its own hooks."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return replace(self, module=copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors}))

    def copy(self) -> Layer:
        """A copy with its own tensors."""
        return replace(self, module=copy.deepcopy(self.module))

    def run(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The layer's output [1, tokens, width]; all arguments are on the layer's device."""
        out = self.module(hidden, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, torch.Tensor)
        return result

    def input_of(self, name: str, run: Callable[[], object]) -> torch.Tensor:
        """The input of reader ``name`` when ``run`` runs the layer; the forward pass stops there."""
        seen: list[torch.Tensor] = []

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(batched(args[0]))
            raise StopForward

        # Registered last, so that an online transform has already run.
        run_until(self.holder(name).register_forward_pre_hook(hook), run)
        return seen[0]

    def call_of(self, name: str, run: Callable[[], object]) -> tuple[Arguments, torch.Tensor]:
        """Arguments and output [tokens, channels] of module ``name`` when ``run`` runs the layer; the forward pass stops there."""
        seen: list[tuple[Arguments, torch.Tensor]] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(((args, kwargs), (output[0] if isinstance(output, tuple) else output)[0]))
            raise StopForward

        run_until(self.part(name).register_forward_hook(hook, with_kwargs=True), run)
        return seen[0]


def batched(x: torch.Tensor) -> torch.Tensor:
    """``x`` as [1, tokens, columns]; shared experts get [tokens, columns]."""
    return x if x.ndim == 3 else x[None]


def run_until(handle: torch.utils.hooks.RemovableHandle, run: Callable[[], object]) -> None:
    """Call ``run``, which the hook of ``handle`` may stop with :class:`StopForward`, then remove the hook."""
    try:
        run()
    except StopForward:
        pass
    finally:
        handle.remove()


def _rows_of(module: nn.Linear, rows: slice) -> nn.Linear:
    """Some rows of ``module`` as a linear over the same memory (a view)."""
    found = nn.Linear(module.in_features, rows.stop - rows.start, module.bias is not None, device="meta")
    found.weight = nn.Parameter(module.weight.detach()[rows], requires_grad=False)
    if module.bias is not None:
        found.bias = nn.Parameter(module.bias.detach()[rows], requires_grad=False)
    return found


def norm_offset(norm: nn.Module) -> float:
    """The constant that a norm adds to its weight: 0 for most families, 1 for Gemma. Determined by running it with weight 0."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    kept = weight.detach().clone()
    with torch.no_grad():
        probe = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
        bias = getattr(norm, "bias", None)
        weight.zero_()
        out = norm(probe) - (bias if isinstance(bias, torch.Tensor) else 0)
        weight.copy_(kept)
    return 0.0 if float(out.abs().max()) == 0.0 else 1.0
