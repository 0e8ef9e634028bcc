"""A measured weight for each class of tokens: MBQ's balance of vision and answer, with prompt text as a third class."""

from __future__ import annotations

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.sensitivity import Sensitivity
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights.floor import bounded
from mbq_gguf.models.layout import Site


def gradient(sensitivity: Sensitivity, layer: int) -> TokenWeights:
    """For layer number ``layer``: each class's mean |dL/dY| in the site's block relative to the answer's, so answer tokens have 1;
    bounded."""

    def weights(stream: Streamed, site: Site) -> torch.Tensor:
        of_class = sensitivity.class_weights(site.branch, layer)
        weighted = [weight * getattr(stream, name).float() for name, weight in of_class.items()]
        return bounded(torch.stack(weighted).sum(dim=0))

    return weights
