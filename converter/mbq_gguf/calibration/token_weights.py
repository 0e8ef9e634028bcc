"""How much each token counts in a loss or a Hessian. A plug-in point: a function from sample and group to one weight a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.stream import Streamed
from mbq_gguf.models.decoder import Group


def uniform(stream: Streamed, group: Group) -> torch.Tensor:
    """All tokens alike (AWQ, GPTQ)."""
    return torch.ones(stream.ids.shape[0])


def modality(ratios: Mapping[str, Sequence[float]], layer: int) -> TokenWeights:
    """MBQ's weights in layer number ``layer``: answer tokens 1, vision tokens the ratio of the group's block, prompt tokens 0."""

    def weights(stream: Streamed, group: Group) -> torch.Tensor:
        return stream.answer.float() + ratios[group.block][layer] * stream.vision.float()

    return weights
