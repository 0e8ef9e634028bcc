"""The results of quantisation, for one layer or for the whole decoder: tensors and facts, named ``KIND/NAME``.

Saving results in a work directory, restoring them, collecting layers and writing files depend only on the kind, so that a stage can add
results without further changes. Names are parameters of the layer (``self_attn.q_proj.weight``) or as the kind says:

    quantised/PARAMETER     a quantised weight: its bytes (tensor), its type and columns (fact)
    replaced/PARAMETER      any other parameter that has changed, float32 (tensor)
    factors/SITE            the channel factors that were folded (tensor), with their exponent in exponent/SITE (fact)
    loss/PARAMETER          the measured loss of rounding it in nats, if types were allocated (fact)
    ratio/BRANCH            the ratio of vision to language sensitivity, one per layer (fact of the decoder)
    metadata/KEY            a value of the text file's metadata (fact); layers' values become an array over layers
    vision/NAME             for the vision file: a parameter by the end of its name (tensor), a metadata value (fact)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mbq_gguf.allocation.plan import Plan
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.models.layer import Layer


@dataclass
class Outcome:
    """Tensors on the host, and facts, which JSON can represent, by ``KIND/NAME``."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def put(self, kind: str, name: str, value: Any) -> None:
        """Add a tensor or a fact."""
        if isinstance(value, torch.Tensor):
            self.tensors[f"{kind}/{name}"] = value.detach().cpu()
        else:
            self.facts[f"{kind}/{name}"] = value

    def put_quantised(self, name: str, quantised: QuantisedTensor) -> None:
        """Add a quantised weight."""
        self.put("quantised", name, torch.from_numpy(quantised.data))
        self.put("quantised", name, [quantised.type_name, quantised.columns])

    def tensors_of(self, kind: str) -> dict[str, torch.Tensor]:
        """The tensors of ``kind`` by name."""
        return _of(kind, self.tensors)

    def facts_of(self, kind: str) -> dict[str, Any]:
        """The facts of ``kind`` by name."""
        return _of(kind, self.facts)

    @property
    def quantised(self) -> dict[str, QuantisedTensor]:
        """Quantised weights by name."""
        data = self.tensors_of("quantised")
        return {name: QuantisedTensor(kind, data[name].numpy(), columns) for name, (kind, columns) in self.facts_of("quantised").items()}


@dataclass
class QuantiseResult(Outcome):
    """The results for the whole decoder: names begin with ``layers.N.``, parameters are decoder-relative."""

    plan: Plan | None = None  # the types, if they were allocated
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    def add_layer(self, index: int, outcome: Outcome) -> None:
        """Add the results of layer ``index``; layers must be added in order."""
        for full, value in outcome.tensors.items():
            self.tensors[_in_layer(index, full)] = value
        for full, value in outcome.facts.items():
            if full.startswith("metadata/"):
                self.facts.setdefault(full, []).append(value)
            else:
                self.facts[_in_layer(index, full)] = value

    def layer(self, index: int) -> Outcome:
        """Tensors and facts of layer ``index``, without metadata."""
        return Outcome(_of_layer(index, self.tensors), _of_layer(index, self.facts))

    @property
    def replaced(self) -> dict[str, torch.Tensor]:
        """Changed parameters other than quantised weights, by name."""
        return self.tensors_of("replaced")

    @property
    def hadamard(self) -> int:
        """Block size of the online transform before down_proj, 0 for none."""
        return int(self.facts.get("metadata/mbq.hadamard.ffn_down", 0))

    @property
    def losses(self) -> dict[str, float]:
        """Measured losses of rounding in nats, by parameter."""
        return self.facts_of("loss")

    @property
    def ratios(self) -> dict[str, list[float]]:
        """Ratios of vision to language sensitivity, one per layer, by branch."""
        return self.facts_of("ratio")

    @property
    def exponents(self) -> dict[str, dict[str, float]]:
        """Exponents of the channel factors, by layer (``layers.0``), then by site."""
        out: dict[str, dict[str, float]] = {}
        for name, exponent in self.facts_of("exponent").items():
            layer, site = name.rsplit(".", 1)
            out.setdefault(layer, {})[site] = exponent
        return out


@torch.no_grad()
def apply_outcome(layer: Layer, outcome: Outcome) -> None:
    """Set the parameters of ``layer`` to those of its ``outcome``; quantised ones are dequantised as from the file."""
    parameters = dict(layer.module.named_parameters())
    for name, value in outcome.tensors_of("replaced").items():
        parameters[name].copy_(value)
    for name, quantised in outcome.quantised.items():
        parameters[name].copy_(torch.from_numpy(quant_type(quantised.type_name).dequantize(quantised.data)))


def _of(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    start = f"{kind}/"
    return {full.removeprefix(start): value for full, value in found.items() if full.startswith(start)}


def _in_layer(index: int, full: str) -> str:
    kind, name = full.split("/", 1)
    return f"{kind}/layers.{index}.{name}"


def _of_layer(index: int, found: dict[str, Any]) -> dict[str, Any]:
    pairs = ((full.split("/", 1), value) for full, value in found.items())
    start = f"layers.{index}."
    return {f"{kind}/{name.removeprefix(start)}": value for (kind, name), value in pairs if name.startswith(start)}
