"""State that the steps share: for the whole walk, and for the current layer.

A field that a step fills is None until then, so that a step in the wrong place fails at once instead of using something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.moments import Replay
from mbq_gguf.calibration.observe import Observed, TokenWeights
from mbq_gguf.calibration.sensitivity import Sensitivity
from mbq_gguf.calibration.sinks import Sinks
from mbq_gguf.calibration.stream import working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import hessian_weights
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.read_ahead import ReadAhead
from mbq_gguf.outcome import Outcome, QuantiseResult
from mbq_gguf.rounding.sequence import Matrix
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.timing import Timer
from mbq_gguf.transforms.preserved import FunctionCheck
from mbq_gguf.transforms.rotation import Rotation, rotate_layer
from mbq_gguf.walk.ahead import Ahead
from mbq_gguf.walk.behind import Behind
from mbq_gguf.workdir import NoWorkDir, WorkDir

Progress = Callable[[str, int, int], None]  # stage, done, total
Value = TypeVar("Value")


@dataclass
class Walk:
    """State that moves from layer to layer.

    ``captured``: the samples before layer 0 of the stored model, until the walk enters the decoder. From then on ``streams`` are the
    inputs of the next layer in the original model (in the rotated basis), and ``prefix`` the same in the rounded model, empty if
    nobody needs them.
    """

    loaded: LoadedModel
    samples: Sequence[Sample]
    settings: QuantiseSettings
    work: WorkDir | NoWorkDir
    progress: Progress
    result: QuantiseResult = field(default_factory=QuantiseResult)
    timer: Timer = field(default_factory=Timer)
    captured: list[Streamed] | None = None
    streams: list[Streamed] | None = None
    prefix: list[Streamed] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    rotation: Rotation | None = None
    sinks: Sinks | None = None
    check: FunctionCheck | None = None
    ahead: Ahead = field(default_factory=Ahead)
    behind: Behind = field(default_factory=Behind)
    coming: ReadAhead | None = None  # the layer after the current one

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the block's time to ``stage``."""
        return self.timer.timed(stage)

    def counted(self, stage: str) -> Callable[[int, int], None]:
        """A progress callback for ``stage``: done and total."""
        return partial(self.progress, stage)

    def token_weights(self, index: int) -> TokenWeights:
        """How GPTQ's Hessians of layer ``index`` weigh tokens."""
        settings, layout = self.settings, self.loaded.decoder.layout
        return hessian_weights(settings.token_weights, layout, index, self.sensitivity, settings.prompt_weight, settings.floor)

    def rotated_layer(self, index: int) -> Layer:
        """A copy of layer ``index`` on the device, rotated if the model is."""
        layer = working_layer(self.loaded, index, self.coming.taken() if self.coming else None)
        if self.rotation:
            rotate_layer(layer, self.rotation)
        return layer


@dataclass
class LayerWork:
    """The current layer: a copy on the device that the steps change, and their results.

    ``weights`` are those of tokens in Hessians; ``type_names`` are by reader; ``passed`` are the walk's streams after the original layer;
    ``before`` are weights as they were rounded; ``shares`` is what experts see of others' tokens. ``arriving`` waits for copies to the host
    and records them in the outcome; ``faults`` are for check_factored, when they have arrived.
    """

    walk: Walk
    layer: Layer
    weights: TokenWeights
    type_names: dict[str, str]
    replay: Replay
    outcome: Outcome = field(default_factory=Outcome)
    arriving: Callable[[], None] = lambda: None
    faults: list[torch.Tensor] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    passed: list[Streamed] | None = None
    observed: Observed | None = None
    matrices: dict[str, Matrix] | None = None
    before: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """The channel factors folded into the layer, by site, on its device."""
        return {site: factors.to(self.layer.device) for site, factors in self.outcome.tensors_of("factors").items()}


def made(value: Value | None) -> Value:
    """The result of an earlier step."""
    assert value is not None, "a step of the walk comes before the one that it needs"
    return value
