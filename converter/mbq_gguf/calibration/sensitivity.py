"""How much the answer depends on each linear's output: the gradients dL/dY of one backward pass, reduced in three ways.

L is the mean cross entropy of a sample's answer tokens in the whole model in floating point. Layers run one at a time. The forward pass
keeps the input of each layer; the backward pass runs each layer again with its graph and passes it the gradient of its output. The result
equals one backward pass through the whole model, with the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from mbq_gguf import parallel
from mbq_gguf.calibration.batches import SHARED, joined
from mbq_gguf.calibration.gradient_sums import CLASSES, GradientSums, StreamSums, rows_of
from mbq_gguf.calibration.spill import kept
from mbq_gguf.calibration.stream import advance, handed_on, logits, to_device, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.parallel import Parts

# Layer inputs kept at a time, on the host or the GPU; a larger calibration set is processed in parts.
HOST_BYTES = 4 << 30
PROBE_SEED = 0


@dataclass
class Sensitivity:
    """What the gradients at the linears' outputs tell.

    ``mean[branch][token class]`` [layers], float64: |dL/dY| at the outputs of the linears that end a branch (o_proj and down_proj),
    averaged over channels and tokens of the class, then over samples (MBQ, arXiv 2412.19509, section 3).

    ``fisher[linear]`` [layers], float64, nats: how much a squared error of the linear's output, summed over channels and averaged over
    tokens, adds to the mean KL divergence of the answers' distributions. To second order, an error e costs E[(e . u) ** 2] / 2, where the
    random gradient u has the Fisher information as its covariance. Assuming that tokens and channels are independent and channels alike,
    fisher = sum over tokens of mean over channels of u ** 2 / 2, averaged over samples: K-FAC's second factor (arXiv 1503.05671, section
    3), with its diagonal averaged.

    ``salience``, one tensor per stream [..., layers, sites, tokens], float32, leading dimensions as in the stream's ``ids``: u ** 2,
    averaged over the output channels of the site's linears. ``fisher`` and ``salience`` are empty unless :func:`measure` was asked for
    them.
    """

    mean: dict[str, dict[str, torch.Tensor]]
    fisher: dict[str, torch.Tensor]
    salience: list[torch.Tensor]

    def ratios(self, floor: bool) -> dict[str, list[float]]:
        """Vision over answer sensitivity per layer for "attention" and "mlp"; with ``floor``, none is below the median over layers.

        The paper's code has the floor, its text does not mention it. Layers without a vision or an answer gradient have ratio 1.
        """
        out = {}
        for block in self.mean:
            ratio = self._over_answer(block, "vision")
            # not torch's median, which for an even number of layers is the lower of the middle two, 1 to 1.5 % less
            out[block] = (ratio.clamp(min=ratio.quantile(0.5)) if floor else ratio).tolist()
        return out

    def class_weights(self, block: str, layer: int) -> dict[str, float]:
        """The sensitivity of each token class relative to the answer's in ``block`` of ``layer``; 1 if one of the two has no gradient."""
        return {name: float(self._over_answer(block, name)[layer]) for name in CLASSES}

    def _over_answer(self, block: str, name: str) -> torch.Tensor:
        ratio = self.mean[block][name] / self.mean[block]["answer"]
        return torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors by name, to be saved; the inverse of :meth:`restored`."""
        out = {f"mean.{block}.{name}": value for block, classes in self.mean.items() for name, value in classes.items()}
        out |= {f"fisher.{name}": value for name, value in self.fisher.items()}
        return out | {f"salience.{number}": value for number, value in enumerate(self.salience)}

    @staticmethod
    def restored(tensors: Mapping[str, torch.Tensor]) -> Sensitivity:
        """The inverse of :meth:`tensors`."""
        names = [name.split(".", 1) for name in tensors]
        blocks = dict.fromkeys(rest.split(".")[0] for part, rest in names if part == "mean")
        mean = {block: {name: tensors[f"mean.{block}.{name}"] for name in CLASSES} for block in blocks}
        count = sum(name.startswith("salience.") for name in tensors)
        fisher = {rest: tensors[f"fisher.{rest}"] for part, rest in names if part == "fisher"}
        return Sensitivity(mean, fisher, [tensors[f"salience.{number}"] for number in range(count)])


def measure(
    loaded: LoadedModel,
    streams: Sequence[Streamed],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    fisher: bool = False,
) -> Sensitivity:
    """The sensitivity of every layer, from ``streams`` before layer 0, which are not changed.

    ``fisher`` requests fisher and salience, which need a second backward pass. ``progress`` is called with layer runs, finished and total.
    """
    layers = len(loaded.decoder.layers)
    sums = GradientSums(loaded.decoder.layout, layers, fisher)
    draw = torch.Generator().manual_seed(PROBE_SEED)
    parts = _parts(streams, layers)
    for number, part in enumerate(parts):
        start, total = 2 * layers * number, 2 * layers * len(parts)
        inputs, part = _forward(loaded, part, partial(_report, progress, start, total))
        own, grads = parallel.own_pieces(len(part)), []
        for place, (stream, hidden) in enumerate(zip(part, inputs.pop(), strict=True)):
            signs = _signs(loaded, stream, draw) if fisher else None  # drawn for all streams, in order
            if place in own:
                grads.append(_end_gradients(loaded, stream, hidden, signs))
        counted = {place: sums.open(part[place]) for place in own}
        owed: list[list[Parts]] = [[{} for _ in ends] for ends in grads]
        for index in reversed(range(layers)):
            entered = inputs.pop()
            streams_of = [replace(part[i], hidden=entered[i], added={}) for i in own]
            grads = _backward(loaded, index, streams_of, grads, owed, list(counted.values()))
            progress(start + 2 * layers - index, total)
        for found in parallel.parallel_map_values(range(len(part)), counted.__getitem__):
            sums.add(found)
    return Sensitivity(*sums.means(), sums.salience)


def _report(progress: Callable[[int, int], None], start: int, total: int, done: int) -> None:
    progress(start + done, total)


def _parts(streams: Sequence[Streamed], layers: int) -> list[list[Streamed]]:
    """Split ``streams`` into parts whose layer inputs take at most HOST_BYTES together (at least one stream each)."""
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


def _forward(loaded: LoadedModel, part: list[Streamed], done: Callable[[int], None]) -> tuple[list[list[torch.Tensor]], list[Streamed]]:
    """The inputs of every layer and the last one's output, [layers + 1][streams], and the streams after the last layer."""
    running = [replace(stream) for stream in part]
    inputs = []
    for index in range(len(loaded.decoder.layers)):
        inputs.append([stream.entering(index) for stream in running])
        advance(working_layer(loaded, index), running)
        done(index + 1)
    return [*inputs, [stream.hidden for stream in running]], running


def _signs(loaded: LoadedModel, stream: Streamed, draw: torch.Generator) -> torch.Tensor:
    """Random signs [answer tokens, vocabulary], -1 and 1."""
    return 2 * torch.randint(2, (int(rows_of(stream.labels)[:, 1:].sum()), loaded.decoder.head.out_features), generator=draw) - 1


def _end_gradients(loaded: LoadedModel, stream: Streamed, hidden: torch.Tensor, signs: torch.Tensor | None) -> list[torch.Tensor]:
    """Gradients at the last layer's output [samples, tokens, width], on the host: of each sample's mean cross entropy of answer tokens,
    and with ``signs`` also u.

    With p an answer token's probabilities and r the signs, v = sqrt(p) r - p (sqrt(p) . r) has the covariance diag(p) - p p^T, the
    Fisher information of its logits, whatever the answer is; u is the gradient of sum(v . logits) / sqrt(answer tokens). Squared gradients
    of the answers' own loss would be dominated by the few samples that the model gets wrong.
    """
    hidden = hidden.to(loaded.device).requires_grad_()
    answered = rows_of(stream.labels)[:, 1:].to(loaded.device)  # position n predicts token n + 1
    predicted = logits(loaded, hidden[:, :-1][answered]).float()
    labels = rows_of(stream.ids)[:, 1:].to(loaded.device)[answered]
    share = (answered / answered.sum(dim=1, keepdim=True))[answered]
    losses = [torch.dot(nn.functional.cross_entropy(predicted, labels, reduction="none"), share)]
    if signs is not None:
        p = predicted.detach().softmax(dim=1)
        probe = p.sqrt() * signs.to(p)
        probe -= p * probe.sum(dim=1, keepdim=True)
        losses.append(torch.dot((probe * predicted).sum(dim=1), share.sqrt()))
    return [torch.autograd.grad(loss, hidden, retain_graph=True)[0].cpu() for loss in losses]


def _backward(
    loaded: LoadedModel,
    index: int,
    entering: list[Streamed],
    grads: list[list[torch.Tensor]],
    owed: list[list[Parts]],
    counted: list[StreamSums],
) -> list[list[torch.Tensor]]:
    """Propagate the gradients of layer ``index``'s output to its input, and count those of its linears' outputs.

    ``owed`` are gradients of keys and values from later layers, by kind, for each stream and gradient; this layer adds its own.
    """
    layer = working_layer(loaded, index)
    seen: dict[str, torch.Tensor] = {}
    watched: dict[str, nn.Module] = {name: layer.holder(name) for name in layer.layout.readers}
    for branch in layer.layout.branches:  # a branch's writer may be a module with many linears
        watched.setdefault(branch.writer, layer.part(branch.writer))
    handles = [module.register_full_backward_hook(_keep(seen, name, layer)) for name, module in watched.items()]
    out: list[list[torch.Tensor]] = []
    for stream, ends, debts, counts in zip(entering, grads, owed, counted, strict=True):
        hidden, kwargs = to_device(joined([stream], index), loaded.device)
        sources = {"": hidden.requires_grad_()} | {kind: pair.requires_grad_() for kind, pair in kwargs.get(SHARED, {}).items()}
        results = {"": layer.run(hidden, kwargs)}
        results |= {kind: pair for kind, pair in handed_on(kwargs).items() if kind in debts[0]}
        out.append([])
        for end, debt, count in zip(ends, debts, (counts.count_loss, counts.count_fisher), strict=False):
            seen.clear()  # an expert that this sample does not reach
            back = [end, *(debt.pop(kind) for kind in results if kind)]
            found = torch.autograd.grad(
                list(results.values()),
                list(sources.values()),
                [gradient.to(loaded.device) for gradient in back],
                retain_graph=end is not ends[-1],
                allow_unused=True,
            )
            own, *others = found
            out[-1].append(kept(own))
            for kind, gradient in zip(list(sources)[1:], others, strict=True):
                if gradient is not None:
                    debt[kind] = kept(gradient + debt[kind].to(gradient) if kind in debt else gradient)
            count(index, seen, layer.layout.sites)
    for handle in handles:  # they refer to the layer and it to them, so its memory would wait for Python's garbage collector
        handle.remove()
    return out


def _keep(seen: dict[str, torch.Tensor], name: str, layer: Layer) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
        seen[name] = layer.outputs(name, outputs[0])

    return hook
