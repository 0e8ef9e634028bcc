"""How to quantise: everything beside the model that decides the outcome, and the one place of its defaults.

Nothing heavy is imported here: ``--help`` shows these defaults at once.
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
ROTATED_TYPES = ("W4A8",)  # where rotation pays as measured, with GPTQ and no equalisation (docs/results.md)
EMBEDDING_TYPE = "Q8_0"
MMPROJ_TYPE = "F16"
TRUST = "--trust-remote-code"
ALONE = "--language-model-only"
TRUST_HELP = "Run Python code that lies in MODEL_DIR, where the model needs it. It can do whatever you can: read it first."


@dataclass(frozen=True)
class QuantiseSettings:
    """The defaults are the combination that scores best (docs/results.md)."""

    type_name: str = "MBQ3S"
    synthetic: int = 80  # so many texts that the model generates join the samples, and half as many procedural pictures
    pictures: bool = True  # False: calibrated on those texts alone, without samples
    target_bpw: float | None = None  # instead of type_name: a type for each tensor, chosen to meet this size (bits a weight)
    method: Method = "rtn"  # how channels are scaled before rounding; rtn: not at all
    rounding: Rounding = "gptq"
    floor: bool = True  # a layer's ratio of vision to language sensitivity is raised to the median over layers, where it is below
    answer_mask: AnswerMask = "header"  # the tokens that stand for the answer in ratios, search and token weights
    token_weights: Kind = "uniform"  # how GPTQ's Hessians weigh tokens
    prompt_weight: float = 1.0  # of a token of the question where token_weights is modality; one of the answer weighs 1
    rotate: Rotate = "none"
    activations: Activations = "dynamic"  # of W4A8 and W8A8: int8 scales found for each token, or measured beforehand for its class
    range_estimator: Estimator = "p99.99"  # of static ranges: 0.0003 nats on scenes where min-max has 0.043 (docs/results.md)
    # the search for equalisation factors
    search_samples: int | None = None  # compares candidates on the first so many samples; None: on all
    search_loss: SearchLoss | None = None  # mean absolute or mean squared error; None: the method's own, mae for MBQ and mse for AWQ
    grouped_o: bool = True  # also o_proj where query heads share a value head, and so its factors; MBQ's authors leave it alone
    propagate_error: bool = True  # a layer is calibrated on what the rounded layers before it (the prefix) give, not the original ones
    # GPTQ's own, without meaning for rounding to nearest
    clip: bool = True  # search each block's range instead of taking it from its smallest and largest weight
    error_correction: float = 0.5  # the share of the prefix's error that a layer compensates; needs propagate_error
    refits: int = 2  # how often scales and minima are fitted to the codes; codes are improved in between (rounding/descent.py)
    learn_scales: int = 0  # passes over the samples in which a layer's scales and minima are learned together; needs propagate_error
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    @property
    def follows_prefix(self) -> bool:
        """Whether the rounded model's own inputs are needed beside the original's."""
        return self.propagate_error and (self.rounding == "gptq" or self.method != "rtn")

    @property
    def power(self) -> int:
        """The power of the errors that the search sums: 1 for mae, 2 for mse."""
        own: SearchLoss = "mse" if self.method == "awq" else "mae"
        return 1 if (self.search_loss or own) == "mae" else 2
