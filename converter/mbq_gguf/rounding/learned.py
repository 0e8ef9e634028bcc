"""Trains the scales and offsets of a quantised layer against the original layer's output, for all matrices of the layer together.

This is Block-AP of EfficientQAT (arXiv 2407.11062, section 3.2) with fixed codes. While GPTQ treats each matrix separately, with second
moments, this uses gradient descent through attention and activation functions. The input comes from the quantised prefix, the target is the
original layer's output for the original input, and tokens are weighted as in GPTQ's Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mbq_gguf.calibration.batches import joined
from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.stream import to_device
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.formats.grid import Grid
from mbq_gguf.models.layer import Layer
from mbq_gguf.rounding.gptq import Coded

# Adam's learning rate, relative to a scale; decays linearly to 0. On layers 0 to 3 of the reference VLM, 36 steps reduce the error on
# held-out samples to 0.79 to 0.86; 12 steps at 5e-4 to 0.91 to 0.95, 24 steps at 5e-3 to 0.88 to 0.95.
RATE = 2e-3
BATCH = 4  # samples per step


@dataclass
class Line:
    """The trainable parameters of one quantised matrix, in units of its scale: ``share`` [rows, groups] is added to the scale, ``shift`` to
    the offset."""

    grid: Grid
    coded: Coded
    share: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, grid: Grid, coded: Coded) -> Line:
        """Initial parameters, all 0."""
        return cls(grid, coded, torch.zeros_like(coded.scale).requires_grad_(), torch.zeros_like(coded.scale).requires_grad_())

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that the type can store."""
        return [self.share, self.shift] if self.grid.offset.free else [self.share]

    def weight(self) -> torch.Tensor:
        """The matrix [rows, columns] as a function of the parameters."""
        coded, group = self.coded, self.grid.group
        scale, offset = coded.scale * (1 + self.share), coded.offset + coded.scale * self.shift
        return coded.codes * scale.repeat_interleave(group, 1) + offset.repeat_interleave(group, 1)

    @torch.no_grad()
    def result(self) -> Coded:
        """The same codes with the trained parameters, rounded to representable values."""
        coded = self.coded
        held = self.grid.held(coded.scale * (1 + self.share), coded.offset + coded.scale * self.shift)
        return Coded(coded.codes, *held, coded.steps)


def learn(
    layer: Layer,
    prefix: Sequence[Streamed],
    targets: Sequence[torch.Tensor],
    weights: TokenWeights,
    rounded: Mapping[str, tuple[Grid, Coded]],
    passes: int,
) -> dict[str, Coded]:
    """Better parameters for the matrices ``rounded`` (by name in ``layer``, which is not changed), or none if training does not help.

    ``prefix`` are the inputs of ``layer``, ``targets`` [1, tokens, width] its desired outputs; ``passes`` is the number of epochs.
    """
    lines = {name: Line.of(grid, coded) for name, (grid, coded) in rounded.items() if grid.scale.free}
    if not lines:
        return {}
    parameters = [parameter for line in lines.values() for parameter in line.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    steps = max(1, passes * len(prefix) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    before = _loss(layer, prefix, targets, weights, {})
    for step in range(steps):
        drawn = [(step * BATCH + number) % len(prefix) for number in range(BATCH)]
        with torch.enable_grad():
            matrices = layer.parameters_with({name: line.weight() for name, line in lines.items()})
            losses = [_error(layer, prefix[i], targets[i], weights, matrices) for i in drawn]
            gradients = torch.autograd.grad(torch.stack(losses).sum() / before, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient  # None for an expert that no token has reached; the step leaves it as it is
        optimiser.step()
        schedule.step()
    found = {name: line.result() for name, line in lines.items()}
    matrices = layer.parameters_with({name: found[name].values(line.grid) for name, line in lines.items()})
    return found if _loss(layer, prefix, targets, weights, matrices) < before else {}


@torch.no_grad()
def _loss(
    layer: Layer,
    prefix: Sequence[Streamed],
    targets: Sequence[torch.Tensor],
    weights: TokenWeights,
    matrices: dict[str, torch.Tensor],
) -> float:
    return sum(float(_error(layer, *pair, weights, matrices)) for pair in zip(prefix, targets, strict=True))


def _error(layer: Layer, stream: Streamed, target: torch.Tensor, weights: TokenWeights, matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted sum over one sample's tokens of the output's squared error, with ``matrices`` instead of the layer's.

    Each token's error is divided by its target's squared norm, as the next norm does: attention sinks are 100 times as long.
    """
    device = layer.device
    entering, kwargs = joined([stream], layer.index)
    out = torch.func.functional_call(layer.module, matrices, (entering.to(device),), to_device(kwargs, device))
    hidden = out[0] if isinstance(out, tuple) else out
    wanted = target.to(device)
    per_token = (hidden - wanted).square().sum(dim=-1)[0] / wanted.square().sum(dim=-1)[0]
    return torch.dot(per_token, weights(stream, layer.layout.last).to(per_token))
