"""A weight for each token from its own gradient, in the manner of VLMQ.

VLMQ weighs a token by the mean |gradient| at the linear's output, of a loss of its own block; QIG (arXiv 2603.17809) clips such weights and
gives every sample the same sum. Here the gradient is the answer loss's, which calibration has measured anyway, as root mean square over the
output channels of the site's linears.
"""

from __future__ import annotations

import torch

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights.floor import bounded
from mbq_gguf.models.layout import Layout, Site


def token(layout: Layout, layer: int) -> TokenWeights:
    """In layer number ``layer`` each token's root mean square gradient over its sample's mean; bounded. Streams without salience
    (synthetic ones) weigh their tokens alike."""

    def weights(stream: Streamed, site: Site) -> torch.Tensor:
        if stream.salience is None:
            return torch.ones(stream.ids.shape)
        return importance(stream.salience[..., layer, layout.sites.index(site), :])

    return weights


def importance(squares: torch.Tensor) -> torch.Tensor:
    """Weights from mean squared gradients [..., tokens]; a sample without any gradient weighs its tokens alike."""
    size = squares.sqrt()
    return bounded(torch.nan_to_num(size / size.mean(dim=-1, keepdim=True), nan=1.0))
