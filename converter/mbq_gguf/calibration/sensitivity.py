"""How much the answer depends on each modality: mean |dL/dY| at the outputs of o_proj and down_proj (MBQ, arXiv 2412.19509, section 3).

L is the mean cross entropy of a sample's answer tokens through the whole model in floating point. Layers are run one at a time: forward,
each layer's input is kept on the host; backward, each layer is run again with its graph and handed the gradient of its output. The result
equals one backward pass through the whole model, at the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from mbq_gguf.calibration.stream import Streamed, advance, logits, run_layer, to_device, working_layer
from mbq_gguf.models.loaded import LoadedModel

# Layer inputs kept on the host at a time; a larger calibration set goes through the layers in parts.
HOST_BYTES = 4 << 30
WATCHED = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
CLASSES = ("vision", "answer", "prompt")


@dataclass
class Sensitivity:
    """``mean[block][token class]`` [layers], float64: |dL/dY|, mean over channels and tokens of the class, then over samples."""

    mean: dict[str, dict[str, torch.Tensor]]

    def ratios(self, floor: bool) -> dict[str, list[float]]:
        """Vision over answer sensitivity per layer for "attention" and "mlp"; with ``floor`` none below the median over layers.

        The floor is what the paper's code does and its text leaves out. Layers without a vision or an answer gradient get ratio 1.
        """
        out = {}
        for block, classes in self.mean.items():
            ratio = classes["vision"] / classes["answer"]
            ratio = torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))
            out[block] = (ratio.clamp(min=ratio.median()) if floor else ratio).tolist()
        return out


def measure(
    loaded: LoadedModel, streams: Sequence[Streamed], progress: Callable[[int, int], None] = lambda done, total: None
) -> Sensitivity:
    """Sensitivity of every layer from ``streams`` at the door of layer 0, which are left as they are.

    ``progress`` takes layer runs, done and total.
    """
    layers = len(loaded.decoder.layers)
    sums = {block: {c: torch.zeros(layers, dtype=torch.float64) for c in CLASSES} for block in WATCHED}
    counts = dict.fromkeys(CLASSES, 0)
    parts = _parts(streams, layers)
    for number, part in enumerate(parts):
        start, total = 2 * layers * number, 2 * layers * len(parts)
        inputs = _forward(loaded, part, partial(_report, progress, start, total))
        grads = [_loss_gradient(loaded, stream, hidden) for stream, hidden in zip(part, inputs.pop(), strict=True)]
        for stream in part:
            for name in CLASSES:
                counts[name] += int(getattr(stream, name).any())
        for index in reversed(range(layers)):
            grads = _backward(loaded, index, part, inputs.pop(), grads, sums)
            progress(start + 2 * layers - index, total)
    return Sensitivity({block: {c: total / max(1, counts[c]) for c, total in classes.items()} for block, classes in sums.items()})


def _report(progress: Callable[[int, int], None], start: int, total: int, done: int) -> None:
    progress(start + done, total)


def _parts(streams: Sequence[Streamed], layers: int) -> list[list[Streamed]]:
    """``streams`` in parts whose layer inputs take at most HOST_BYTES together (one stream at least)."""
    parts: list[list[Streamed]] = [[]]
    held = 0
    for stream in streams:
        size = stream.hidden.numel() * stream.hidden.element_size() * (layers + 1)
        if parts[-1] and held + size > HOST_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(stream)
        held += size
    return parts


def _forward(loaded: LoadedModel, part: list[Streamed], done: Callable[[int], None]) -> list[list[torch.Tensor]]:
    """Inputs of every layer, and the last one's output: [layers + 1][samples]."""
    running = [replace(stream) for stream in part]
    inputs = [[stream.hidden for stream in running]]
    for index in range(len(loaded.decoder.layers)):
        advance(working_layer(loaded, index), index, running, loaded.device)
        inputs.append([stream.hidden for stream in running])
        done(index + 1)
    return inputs


def _loss_gradient(loaded: LoadedModel, stream: Streamed, hidden: torch.Tensor) -> torch.Tensor:
    """Gradient of the answer tokens' mean cross entropy at the last layer's output [1, tokens, width], on the host."""
    hidden = hidden.to(loaded.device).requires_grad_()
    answered = stream.answer[1:].to(loaded.device)  # position n predicts token n + 1
    predicted = logits(loaded, hidden[:, :-1][:, answered])[0].float()
    labels = stream.ids[1:].to(loaded.device)[answered]
    loss = nn.functional.cross_entropy(predicted, labels)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient.cpu()


def _backward(
    loaded: LoadedModel,
    index: int,
    part: list[Streamed],
    inputs: list[torch.Tensor],
    grads: list[torch.Tensor],
    sums: dict[str, dict[str, torch.Tensor]],
) -> list[torch.Tensor]:
    """Take the gradients of layer ``index``'s output to its input, and add |dL/dY| of the watched linears to ``sums``."""
    layer = working_layer(loaded, index)
    out = []
    for stream, hidden, grad in zip(part, inputs, grads, strict=True):
        hidden = hidden.to(loaded.device).requires_grad_()
        seen: dict[str, torch.Tensor] = {}
        handles = [layer.get_submodule(name).register_full_backward_hook(_keep(seen, block)) for block, name in WATCHED.items()]
        output = run_layer(layer, hidden, to_device(stream.kwargs[index], loaded.device))
        (gradient_in,) = torch.autograd.grad(output, hidden, grad.to(loaded.device))
        for handle in handles:
            handle.remove()
        out.append(gradient_in.cpu())
        for block, gradient in seen.items():
            per_token = gradient[0].abs().mean(dim=1).double().cpu()
            for name in CLASSES:
                mask = getattr(stream, name)
                if mask.any():
                    sums[block][name][index] += per_token[mask].mean()
    return out


def _keep(seen: dict[str, torch.Tensor], block: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
        seen[block] = outputs[0]

    return hook
