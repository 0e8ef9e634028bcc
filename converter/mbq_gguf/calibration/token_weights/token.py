"""Weighs each token by its own gradient, similar to VLMQ.

VLMQ weighs a token by the mean |gradient| at the linear's output, for a loss of its own block; QIG (arXiv 2603.17809) clips such weights
and gives every sample the same sum. Here the gradient is that of the answer loss, which calibration has measured anyway, as root mean
square over the output channels of the site's linears.
"""

from __future__ import annotations

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights.floor import bounded
from mbq_gguf.models.layout import Layout, Site


def token(layout: Layout, layer: int) -> TokenWeights:
    """For layer number ``layer``: each token's root mean square gradient relative to its sample's mean; bounded. In streams without
    salience (synthetic ones) all tokens have the same weight.
    """

    def weights(stream: Streamed, site: Site) -> torch.Tensor:
        if stream.salience is None:
            return torch.ones(stream.ids.shape)
        return importance(stream.salience[..., layer, layout.sites.index(site), :])

    return weights


def importance(squares: torch.Tensor) -> torch.Tensor:
    """Weights from mean squared gradients [..., tokens]; a sample without any gradient weighs its tokens alike."""
    size = squares.sqrt()
    return bounded(torch.nan_to_num(size / size.mean(dim=-1, keepdim=True), nan=1.0))
