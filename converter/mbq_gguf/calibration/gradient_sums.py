"""Reduces the gradients at the outputs of linears, stream by stream: sums over the tokens of a class and over samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layout import Layout, Site

CLASSES = ("vision", "answer", "prompt")


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """Ids or a mask of one sample [tokens] or several [samples, tokens], always as [samples, tokens]."""
    return values.reshape(-1, values.shape[-1])


class GradientSums:
    """Sums over samples, and the salience of each stream; ``fisher`` tells whether the second pass is counted too."""

    def __init__(self, layout: Layout, layers: int, fisher: bool) -> None:
        self.layout, self.layers = layout, layers
        self.mean = {branch.name: {c: torch.zeros(layers, dtype=torch.float64) for c in CLASSES} for branch in layout.branches}
        self.fisher = {name: torch.zeros(layers, dtype=torch.float64) for name in (layout.readers if fisher else ())}
        self.salience: list[torch.Tensor] = []
        self.having = dict.fromkeys(CLASSES, 0)  # samples that have tokens of the class

    def open(self, stream: Streamed) -> StreamSums:
        """An empty contribution for ``stream``."""
        masks = {name: rows_of(getattr(stream, name)) for name in CLASSES}
        samples, tokens = masks["answer"].shape
        salience = torch.zeros(samples, self.layers, len(self.layout.sites), tokens)
        mean = {block: {c: torch.zeros_like(total) for c, total in classes.items()} for block, classes in self.mean.items()}
        fisher = {name: torch.zeros_like(total) for name, total in self.fisher.items()}
        return StreamSums(self.layout, masks, mean, fisher, salience.view(*stream.ids.shape[:-1], *salience.shape[1:]))

    def add(self, found: StreamSums) -> None:
        """Add the contribution of one stream, in the order of streams."""
        for name, mask in found.masks.items():
            self.having[name] += int(mask.any(dim=1).sum())
        for block, classes in found.mean.items():
            for token_class, values in classes.items():
                self.mean[block][token_class] += values
        for name, values in found.fisher.items():
            self.fisher[name] += values
        if self.fisher:
            self.salience.append(found.salience)

    def means(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """``mean`` and ``fisher`` of :class:`mbq_gguf.calibration.sensitivity.Sensitivity`."""
        mean = {block: {c: total / max(1, self.having[c]) for c, total in classes.items()} for block, classes in self.mean.items()}
        samples = max(1, self.having["answer"])
        return mean, {name: total / samples for name, total in self.fisher.items()}


@dataclass
class StreamSums:
    """The contribution of one stream to :class:`GradientSums`: ``masks`` [samples, tokens], sums over its samples [layers] in ``mean`` and
    ``fisher``, and ``salience`` [..., layers, sites, tokens].
    """

    layout: Layout
    masks: dict[str, torch.Tensor]
    mean: dict[str, dict[str, torch.Tensor]]
    fisher: dict[str, torch.Tensor]
    salience: torch.Tensor

    def count_loss(self, index: int, gradients: Mapping[str, torch.Tensor], _sites: Sequence[Site]) -> None:
        """Add the loss's gradients [samples, tokens, channels] at the outputs of layer ``index``'s linears, by name."""
        for branch in self.layout.branches:
            if branch.writer not in gradients:  # not in this kind of layer
                continue
            absolute = gradients[branch.writer].float().abs().mean(dim=2).double().cpu()
            for token_class, mask in self.masks.items():
                having = mask.any(dim=1)
                of_class = (absolute * mask).sum(dim=1)[having] / mask.sum(dim=1)[having]
                self.mean[branch.name][token_class][index] += of_class.sum()

    def count_fisher(self, index: int, gradients: Mapping[str, torch.Tensor], sites: Sequence[Site]) -> None:
        """Add u [samples, tokens, channels] at the outputs of layer ``index``'s linears, by name; ``sites`` are the layer's."""
        salience = self.salience.view(-1, *self.salience.shape[-3:])
        for place, site in enumerate(self.layout.sites):
            if site not in sites:  # not in this kind of layer
                continue
            squares = {name: gradients[name].float().square().mean(dim=2).cpu() for name in site.readers}
            for name, square in squares.items():
                self.fisher[name][index] += square.double().sum() / 2
            sizes = {name: gradients[name].shape[2] for name in site.readers}
            salience[:, index, place] = sum(squares[name] * (size / sum(sizes.values())) for name, size in sizes.items())
