#!/usr/bin/env python3
"""Compare ways to handle a Hadamard transform's first channel, the sum of all others: keep it, split it off (MQuant's RMS), or avoid it
with random signs.

    python tools/trial_split.py MODEL_DIR --questions 12

Only the matrices after an online transform are quantised (fc2 of the vision tower and down_proj of the language model), to 4 bits with
activations of 8 or 4 bits, one scale per row each. The split keeps the first channel of each block in floating point, as in the code of
MQuant's authors (arXiv 2502.00425); there is one random sign per input channel. Prints the products' relative error, averaged over
layers, and the divergence of the answers in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import trial_quality as trial
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.lazy import materialise
from mbq_gguf.transforms.hadamard import block_size, hadamard, random_signs
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from trial_rows import asked, figures

PARTS = {"tower's fc2": ".mlp.fc2", "language model's down_proj": ".mlp.down_proj"}  # and how the modules' names end
VARIANTS = ("none", "Hadamard", "Hadamard, first channel split off", "Hadamard, random signs")
SHRINKS = torch.linspace(1.0, 0.4, 25)


@dataclass(frozen=True)
class Bits:
    """``searched``: a row's weight range minimises the squared error; otherwise it is the largest weight."""

    weights: int
    activations: int
    searched: bool

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}, {'searched' if self.searched else 'largest weight'}"


BITS = (Bits(4, 8, searched=False), Bits(4, 8, searched=True), Bits(4, 4, searched=True))


def rounded(x: torch.Tensor, bits: int, shrink: float = 1.0) -> torch.Tensor:
    """Rows of ``x`` rounded to ``bits``, symmetric; a row's range is its largest value times ``shrink``."""
    limit = float(2 ** (bits - 1) - 1)
    scale = (x.abs().amax(-1, keepdim=True) * shrink / limit).clamp(min=1e-30)
    return scale * (x / scale).round().clamp(-limit, limit)


def rounded_weights(weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    """``weight`` [rows, columns] rounded, each row with the best of ``SHRINKS`` if they are searched."""
    best = rounded(weight, bits.weights)
    least = (best - weight).square().sum(-1, keepdim=True)
    for shrink in SHRINKS[1:] if bits.searched else ():
        found = rounded(weight, bits.weights, float(shrink))
        error = (found - weight).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


@dataclass
class Product:
    """Replaces a linear's product, and sums its squared error."""

    weight: torch.Tensor  # turned and rounded [rows, columns], float32
    apart: torch.Tensor  # the columns that are split off, as floats [rows, channels]
    channels: torch.Tensor
    turn: Callable[[torch.Tensor], torch.Tensor]
    bits: int
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __deepcopy__(self, memo: Any) -> Product:
        return self  # layers are copied with their hooks, and what the copies sum must arrive here

    @torch.no_grad()
    def __call__(self, module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        turned = self.turn(args[0].float())
        apart = turned[..., self.channels] @ self.apart.t()
        turned[..., self.channels] = 0
        found = rounded(turned, self.bits) @ self.weight.t() + apart
        exact = output.float() - (0 if module.bias is None else module.bias.float())
        self.sums[0] += float((found - exact).square().sum())
        self.sums[1] += float(exact.square().sum())
        return (output.float() + found - exact).to(output)

    @property
    def error(self) -> float:
        """The relative error of all products so far."""
        return float((self.sums[0] / self.sums[1]) ** 0.5)


def product_of(module: nn.Linear, variant: str, bits: Bits, block: int) -> Product:
    """The product of ``module`` after a transform of each ``block`` of its inputs."""
    columns = module.in_features
    signs = torch.ones(columns)
    if variant.endswith("signs"):
        signs = random_signs(columns, torch.Generator().manual_seed(0)).float()
    matrix = torch.eye(block) if variant == "none" else hadamard(block).t().float()  # its first column: all the same

    def turn(x: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = (x * signs).reshape(*x.shape[:-1], -1, block) @ matrix
        return turned.flatten(-2)

    weight = turn(module.weight.detach().float())
    channels = torch.arange(0, columns if variant.endswith("off") else 0, block)
    apart = weight[:, channels]
    weight[:, channels] = 0
    return Product(rounded_weights(weight, bits), apart, channels, turn, bits.activations)


@contextmanager
def products(modules: Sequence[nn.Linear], variant: str, bits: Bits, block: int) -> Iterator[list[Product]]:
    """While open, ``modules`` and copies of them multiply this way."""
    found = [product_of(module, variant, bits, block) for module in modules]
    handles = [module.register_forward_hook(product) for module, product in zip(modules, found, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def linears(loaded: LoadedModel, ending: str) -> list[nn.Linear]:
    return [module for name, module in loaded.model.named_modules() if name.endswith(ending) and isinstance(module, nn.Linear)]


def scored(loaded: LoadedModel, questions: int, part: str, reference: Any, variant: str, bits: Bits) -> tuple[float, dict[str, float]]:
    """The mean error of a part's products, and the figures of the answers."""
    modules = linears(loaded, PARTS[part])
    columns = modules[0].in_features
    block = columns if part.startswith("tower") else block_size(columns)  # the paper's; what the product computes
    with products(modules, variant, bits, block) as found:
        streams = asked(loaded, questions)
        answers = trial.answer_logits(loaded, streams, None, "none")
    return sum(product.error for product in found) / len(found), figures(reference, answers, streams)


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--questions", default=12, show_default=True, help="Number of questions about scenes.")
def main(model_dir: Path, questions: int) -> None:
    """Compare the transforms on MODEL_DIR."""
    console = Console(width=160)
    loaded = load(model_dir)
    materialise(loaded.model, loaded.device, loaded.dtype)  # every layer's down_proj is turned before any layer's turn
    reference = trial.answer_logits(loaded, asked(loaded, questions), None, "none")
    for part in PARTS:
        table = Table("transform", *(f"{bits}: {what}" for bits in BITS for what in ("error", "KLD")), title=part)
        for variant in track(VARIANTS, description=part, console=Console(stderr=True)):
            cells = []
            for bits in BITS:
                error, found = scored(loaded, questions, part, reference, variant, bits)
                cells += [f"{error:.3f}", f"{found['kld']:.2g} ± {found['error']:.1g}"]
            table.add_row(variant, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
