"""The plan of a file with several quant types: the type of each tensor, and a table that reports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table

from mbq_gguf.allocation.knapsack import Option, choose
from mbq_gguf.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """The types chosen, all by tensor name: type, bytes, number of weights, predicted loss (nats)."""

    type_names: dict[str, str]
    sizes: dict[str, int]
    weights: dict[str, int]
    losses: dict[str, float]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * sum(self.sizes.values()) / sum(self.weights.values())

    @property
    def main(self) -> str:
        """The type of most weights."""
        counts = Counter[str]()
        for tensor, kind in self.type_names.items():
            counts[kind] += self.weights[tensor]
        return counts.most_common(1)[0][0]

    @property
    def predicted(self) -> float:
        """The predicted loss of all tensors together, in nats."""
        return sum(self.losses.values())


def check_target(smallest: int, weights: int, target: float) -> None:
    """Raise UsageError if ``weights`` weights in at least ``smallest`` bytes exceed ``target`` bits per weight."""
    if smallest > int(target * weights / 8):
        raise UsageError(f"the smallest types take {8 * smallest / weights:.3f} bits per weight: give a larger --target-bpw")


def make_plan(options: Mapping[str, Mapping[str, Option]], weights: Mapping[str, int], target: float) -> Plan:
    """The plan with the least predicted loss at no more than ``target`` bits per weight. ``options`` are by tensor and type, ``weights``
    are counts by tensor.

    Raises UsageError if even the smallest types exceed the target.
    """
    names = [(tensor, list(kinds)) for tensor, kinds in options.items()]
    limit = int(target * sum(weights.values()) / 8)
    check_target(sum(min(option.size for option in kinds.values()) for kinds in options.values()), sum(weights.values()), target)
    chosen = choose([[options[tensor][kind] for kind in kinds] for tensor, kinds in names], limit)
    assert chosen is not None
    type_names = {tensor: kinds[k] for (tensor, kinds), k in zip(names, chosen, strict=True)}
    taken = {tensor: options[tensor][kind] for tensor, kind in type_names.items()}
    return Plan(
        type_names,
        {tensor: option.size for tensor, option in taken.items()},
        {tensor: weights[tensor] for tensor in taken},
        {tensor: option.loss for tensor, option in taken.items()},
    )


def plan_table(plan: Plan, measured: Mapping[str, float]) -> Table:
    """One line per kind of tensor (such as q_proj of all layers): its types, predicted and ``measured`` losses; and the totals."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tensors")
    table.add_column("types")
    for column in ("bits per weight", "predicted nats", "measured nats"):
        table.add_column(column, justify="right")
    kinds = {name: name.split(".", 2)[2].removesuffix(".weight") for name in plan.type_names}
    for kind in dict.fromkeys(kinds.values()):
        table.add_row(kind, *_line(plan, measured, [name for name in plan.type_names if kinds[name] == kind]))
    table.add_section()
    table.add_row("all", *_line(plan, measured, list(plan.type_names)), style="bold")
    return table


def _line(plan: Plan, measured: Mapping[str, float], names: list[str]) -> tuple[str, str, str, str]:
    counts = Counter(plan.type_names[name] for name in names)
    bits = 8 * sum(plan.sizes[name] for name in names) / sum(plan.weights[name] for name in names)
    types = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return types, f"{bits:.3f}", f"{sum(plan.losses[name] for name in names):.3g}", f"{sum(measured[name] for name in names):.3g}"
