"""MBQ's weights (arXiv 2412.19509, equations 14 to 17)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.layout import Site


def modality(ratios: Mapping[str, Sequence[float]], layer: int, prompt: float = 0.0) -> TokenWeights:
    """For layer number ``layer``: answer tokens have 1, vision tokens the ratio of the site's block, prompt tokens ``prompt`` (0 in the
    paper)."""

    def weights(stream: Streamed, site: Site) -> torch.Tensor:
        return stream.answer.float() + ratios[site.branch][layer] * stream.vision.float() + prompt * stream.prompt.float()

    return weights
