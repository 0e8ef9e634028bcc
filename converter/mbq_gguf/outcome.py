"""What quantisation gives: of one layer, as the work directory keeps it, and of the whole decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mbq_gguf.allocation.plan import Plan
from mbq_gguf.formats.quant_type import Bytes


@dataclass(frozen=True)
class Packed:
    """A quantised weight as the file stores it: ``data`` uint8 [rows, row_bytes] of type ``type_name``, rows of ``columns`` weights."""

    type_name: str
    data: Bytes
    columns: int


@dataclass
class QuantiseResult:
    """Everything that export needs, by decoder-relative parameter names (``layers.0.self_attn.q_proj.weight``)."""

    packed: dict[str, Packed] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)  # other parameters that equalisation changed, float32
    ratios: dict[str, list[float]] = field(default_factory=dict)  # "attention" and "mlp", one a layer
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)  # by layer name, then group
    fallbacks: list[tuple[str, str]] = field(default_factory=list)  # parameter name and the type it fell back to
    projector: dict[str, torch.Tensor] = field(default_factory=dict)  # rotated "weight" and "bias" of the projector's last linear
    hadamard: int = 0  # block of the online transform before down_proj, 0: none
    plan: Plan | None = None  # the types, where they were allocated
    losses: dict[str, float] = field(default_factory=dict)  # what they cost as measured (nats), by parameter name
    seconds: dict[str, float] = field(default_factory=dict)  # by stage


@dataclass
class LayerWork:
    """What is kept of a finished layer: names are relative to the layer."""

    packed: dict[str, Packed]
    replaced: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor]
    exponents: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)  # measured cost (nats) of each weight, where types were allocated


def saved_layer(done: LayerWork) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A finished layer as tensors and JSON data; the inverse of :func:`restored_layer`."""
    tensors = {f"packed.{name}": torch.from_numpy(packed.data) for name, packed in done.packed.items()}
    tensors |= {f"replaced.{name}": value.cpu() for name, value in done.replaced.items()}
    tensors |= {f"factors.{name}": value.cpu() for name, value in done.factors.items()}
    kinds = {name: [packed.type_name, packed.columns] for name, packed in done.packed.items()}
    return tensors, {"packed": kinds, "exponents": done.exponents, "losses": done.losses}


def restored_layer(saved: tuple[dict[str, torch.Tensor], Any] | None) -> LayerWork | None:
    if saved is None:
        return None
    tensors, data = saved
    packed = {name: Packed(kind, tensors[f"packed.{name}"].numpy(), columns) for name, (kind, columns) in data["packed"].items()}
    parts = {part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)} for part in ("replaced.", "factors.")}
    return LayerWork(packed, parts["replaced."], parts["factors."], data["exponents"], data["losses"])
