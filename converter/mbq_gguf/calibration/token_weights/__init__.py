"""How much each token counts in a loss or a Hessian. Extension point: a weighting is a function of sample and site that returns one weight
per token.

Each weighting is a module; :func:`hessian_weights` finds it by name for the Hessians of GPTQ.
"""

from __future__ import annotations

from typing import Literal, get_args

from mbq_gguf.calibration.observe import TokenWeights
from mbq_gguf.calibration.sensitivity import Sensitivity
from mbq_gguf.calibration.token_weights.floor import FLOOR, floored
from mbq_gguf.calibration.token_weights.gradient import gradient
from mbq_gguf.calibration.token_weights.modality import modality
from mbq_gguf.calibration.token_weights.token import token
from mbq_gguf.calibration.token_weights.uniform import uniform
from mbq_gguf.models.layout import Layout

__all__ = ["FLOOR", "KINDS", "Kind", "gradient", "hessian_weights", "modality", "token", "uniform"]

Kind = Literal["uniform", "modality", "gradient", "token"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def hessian_weights(kind: Kind, layout: Layout, layer: int, sensitivity: Sensitivity | None, prompt: float, floor: bool) -> TokenWeights:
    """The weighting ``kind`` for layer number ``layer`` of a decoder with ``layout``; no token is below :data:`FLOOR`.

    All but uniform need ``sensitivity``; ``prompt`` is modality's weight of a prompt token, and ``floor`` raises its ratios to at least
    their median.
    """
    if kind == "uniform":
        return uniform
    assert sensitivity is not None
    if kind == "modality":
        return floored(modality(sensitivity.ratios(floor), layer, prompt))
    return gradient(sensitivity, layer) if kind == "gradient" else token(layout, layer)
