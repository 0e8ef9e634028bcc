"""One decoder layer as a value: its module, its number and its layout."""

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


class ReachedError(Exception):
    """Ends a layer's run where what was wanted is there; the rest would be thrown away."""


@dataclass(frozen=True)
class Layer:
    """Decoder layer number ``index``, usually a copy on the device that is being changed; ``layout`` says what is where in ``module``."""

    module: nn.Module
    index: int
    layout: Layout

    @property
    def sites(self) -> tuple[Site, ...]:
        """The activations that matrices read, in the order in which they are computed."""
        return self.layout.sites

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
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
        """What each row of the input of ``site`` counts in the latest run [rows], from what each of its tokens does [tokens]."""
        if site.expert is None or self.experts is None:
            return weights
        return weights[self.experts.rows[site.expert]] * self.experts.weights[site.expert]

    def linear(self, name: str) -> nn.Linear:
        """The linear called ``name``, for its weight and bias.

        A reader that is rows of a fused linear comes as a linear over the same memory: what is written into it is written into the layer.
        It is not what the layer runs, so hooks go to :meth:`holder`.
        """
        module, fused = self.holder(name), self.layout.fused_of(name)
        return _rows_of(module, fused.rows(self.module)[name]) if fused else module

    def holder(self, name: str) -> nn.Linear:
        """The linear that the layer runs for the reader ``name``: itself, or the fused one."""
        module = self.part(self.layout.linear_of(name))
        assert isinstance(module, nn.Linear)
        return module

    def narrow_writer(self, site: Site) -> nn.Linear | None:
        """The linear that alone reads ``site`` and writes fewer channels than it reads into the residual stream (down_proj); None where
        there is no such."""
        name = site.readers[0]
        if len(site.readers) > 1 or name not in {branch.writer for branch in self.layout.branches} or self.layout.fused_of(name):
            return None
        linear = self.holder(name)
        return linear if linear.out_features < linear.in_features else None

    def outputs(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The channels of the reader ``name`` in ``values`` [..., channels] at its holder's output."""
        fused = self.layout.fused_of(name)
        return values[..., fused.rows(self.module)[name]] if fused else values

    def parameters_with(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The module's parameters, by name, in which readers have ``weights``; other rows of a fused linear as they are."""
        all_weights = {name: weights[name] if name in weights else self.linear(name).weight for name in self.layout.readers}
        changed = {self.layout.linear_of(name) for name in weights}
        by_linear = self.layout.by_linear(all_weights)
        return {f"{name}.weight": torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in by_linear.items() if name in changed}

    def absorber(self, site: Site) -> nn.Module:
        """What takes the inverse of the factors of a foldable ``site``; a linear as :meth:`linear` gives it."""
        assert site.absorber is not None
        return self.linear(site.absorber) if site.absorber in self.layout.readers else self.part(site.absorber)

    def twin(self) -> Layer:
        """The same layer in modules of its own over the same tensors: two threads can run it at a time, each with hooks of its own."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return replace(self, module=copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors}))

    def copy(self) -> Layer:
        """The same layer in tensors of its own."""
        return replace(self, module=copy.deepcopy(self.module))

    def run(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Output [1, tokens, width]; everything on the layer's device."""
        out = self.module(hidden, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, torch.Tensor)
        return result

    def input_of(self, name: str, run: Callable[[], object]) -> torch.Tensor:
        """What the reader ``name`` is given while ``run`` runs the layer, which ends there."""
        seen: list[torch.Tensor] = []

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(batched(args[0]))
            raise ReachedError

        # The last of the module's hooks, so that an online transform before it has run already.
        until(self.holder(name).register_forward_pre_hook(hook), run)
        return seen[0]

    def call_of(self, name: str, run: Callable[[], object]) -> tuple[Arguments, torch.Tensor]:
        """Arguments and output [tokens, channels] of the module ``name`` while ``run`` runs the layer, which ends there."""
        seen: list[tuple[Arguments, torch.Tensor]] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(((args, kwargs), (output[0] if isinstance(output, tuple) else output)[0]))
            raise ReachedError

        until(self.part(name).register_forward_hook(hook, with_kwargs=True), run)
        return seen[0]


def batched(x: torch.Tensor) -> torch.Tensor:
    """[tokens, columns], as what all tokens pass among experts is given, as [1, tokens, columns]."""
    return x if x.ndim == 3 else x[None]


def until(handle: torch.utils.hooks.RemovableHandle, run: Callable[[], object]) -> None:
    """Call ``run``, which the hook of ``handle`` ends by a :class:`ReachedError`, and take the hook away."""
    try:
        run()
    except ReachedError:
        pass
    finally:
        handle.remove()


def _rows_of(module: nn.Linear, rows: slice) -> nn.Linear:
    """Some rows of ``module`` as a linear over the same memory."""
    found = nn.Linear(module.in_features, rows.stop - rows.start, module.bias is not None, device="meta")
    found.weight = nn.Parameter(module.weight.detach()[rows], requires_grad=False)
    if module.bias is not None:
        found.bias = nn.Parameter(module.bias.detach()[rows], requires_grad=False)
    return found


def norm_offset(norm: nn.Module) -> float:
    """What the norm adds to its weight before it multiplies: 0 for most families, 1 for Gemma's. Found by running it with weight 0."""
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
