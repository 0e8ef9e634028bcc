"""MBQ's weights (arXiv 2412.19509, equations 14 to 17)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.stream import Streamed
from mbq_gguf.models.decoder import Group


def modality(ratios: Mapping[str, Sequence[float]], layer: int, prompt: float = 0.0) -> TokenWeights:
    """In layer number ``layer`` answer tokens 1, vision tokens the ratio of the group's block, prompt tokens ``prompt`` (the paper: 0)."""

    def weights(stream: Streamed, group: Group) -> torch.Tensor:
        return stream.answer.float() + ratios[group.block][layer] * stream.vision.float() + prompt * stream.prompt.float()

    return weights
