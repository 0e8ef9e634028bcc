"""All settings that affect the outcome, besides the model, with their defaults (which are defined only here).

Imports nothing heavy, so that ``--help`` can show the defaults at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mbq_gguf.calibration.dataset import Turns
    from mbq_gguf.calibration.magnitudes import Estimator
    from mbq_gguf.calibration.token_weights import Kind
    from mbq_gguf.models.prompts import AnswerMask
    from mbq_gguf.transforms.rotation import Rotate

Method = Literal["rtn", "awq", "mbq", "smoothquant"]
Rounding = Literal["nearest", "gptq"]
SearchLoss = Literal["mae", "mse"]
Activations = Literal["dynamic", "static"]

SAMPLES = 96  # 64 left one seed of two above 0.012 nats on scenes, 96 none of three (docs/log.md)
SEED = 0
TURNS: Turns = "all"
DEVICE = "cpu"
ROTATED_TYPES = ("W4A8",)  # types for which rotation helps, with GPTQ and without equalisation (docs/results.md)
EMBEDDING_TYPE = "Q8_0"
MMPROJ_TYPE = "F16"
TRUST = "--trust-remote-code"
LANGUAGE_ONLY = "--language-model-only"
TRUST_HELP = "Run Python code from the model directory if the model needs it. It can do anything you can: read it first."


@dataclass(frozen=True)
class QuantiseSettings:
    """How to quantise. The defaults are the combination that scores best (docs/results.md)."""

    type_name: str = "MBQ3S"
    synthetic: int = 80  # number of texts that the model generates for calibration; half as many procedural pictures are added
    pictures: bool = True  # False: calibrate on those texts only, without samples
    target_bpw: float | None = None  # instead of type_name: a type for each tensor, chosen to meet this size (bits per weight)
    method: Method = "rtn"  # how channels are scaled before rounding; rtn: not at all
    rounding: Rounding = "gptq"
    floor: bool = True  # raise a layer's ratio of vision to language sensitivity to at least the median over layers
    answer_mask: AnswerMask = "header"  # the tokens that count as the answer in ratios, search and token weights
    token_weights: Kind = "uniform"  # how GPTQ's Hessians weigh tokens
    prompt_weight: float = 1.0  # weight of a question token if token_weights is modality; an answer token has weight 1
    rotate: Rotate = "none"
    activations: Activations = "dynamic"  # of W4A8 and W8A8: int8 scales computed for each token, or fixed for its class by calibration
    range_estimator: Estimator = "p99.99"  # of static ranges: 0.0003 nats on scenes where min-max has 0.043 (docs/results.md)
    # search for equalisation factors
    search_samples: int | None = None  # compare candidates on the first N samples; None: on all
    search_loss: SearchLoss | None = None  # mean absolute or mean squared error; None: the method's own, mae for MBQ and mse for AWQ
    grouped_o: bool = True  # scale o_proj even if query heads share a value head and thus its factors; MBQ's authors do not
    propagate_error: bool = True  # calibrate on the outputs of the quantised layers before (the prefix), not the original ones
    # GPTQ only
    clip: bool = True  # search each block's range instead of taking it from its smallest and largest weight
    error_correction: float = 0.5  # the share of the prefix's error that a layer corrects; needs propagate_error
    refits: int = 2  # how often scales and minima are refitted to the codes, alternating with rounding/descent.py
    learn_scales: int = 0  # passes over the samples that train a layer's scales and minima; needs propagate_error
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    @property
    def follows_prefix(self) -> bool:
        """Whether the quantised model's activations are needed in addition to the original's."""
        return self.propagate_error and (self.rounding == "gptq" or self.method != "rtn")

    @property
    def sums_originals(self) -> bool:
        """Whether GPTQ needs Hessians of the original model's inputs."""
        return self.rounding == "gptq" and (self.method != "rtn" or not self.follows_prefix)

    @property
    def power(self) -> int:
        """The exponent of the errors that the search sums: 1 for mae, 2 for mse."""
        own: SearchLoss = "mse" if self.method == "awq" else "mae"
        return 1 if (self.search_loss or own) == "mae" else 2
