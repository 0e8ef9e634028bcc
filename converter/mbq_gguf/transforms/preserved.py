"""Checks on the actual model, before rounding, that the transforms have preserved its function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mbq_gguf.calibration.stream import advance, logits, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.errors import UserError
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.transforms.rotation import Rotation

CHECK_SAMPLES = 2
# Largest relative change allowed in float32 over the whole decoder.
BOUND = 1e-3


class FunctionCheck:
    """Runs two copies of the first samples, one through the stored layers and one through the transformed ones."""

    def __init__(self, loaded: LoadedModel, streams: Sequence[Streamed], rotation: Rotation | None) -> None:
        self.loaded = loaded
        self.plain = [replace(stream) for stream in streams[:CHECK_SAMPLES]]
        self.residual = rotation.residual if rotation else None
        self.transformed = [stream.turned(rotation.residual) if rotation else replace(stream) for stream in self.plain]

    def layer(self, transformed: Layer) -> None:
        """Compare the outputs of ``transformed`` and the stored layer; UserError if they differ by more than :data:`BOUND` of the norm."""
        advance(working_layer(self.loaded, transformed.index), self.plain)
        advance(transformed, self.transformed)
        for ours, stored in zip(self.transformed, self.plain, strict=True):
            wanted = self._into_basis(stored.hidden).to(ours.hidden.device)
            change = float((ours.hidden - wanted).norm() / wanted.norm())
            if not change <= BOUND:
                raise UserError(
                    f"the transforms change the output of decoder layer {transformed.index} by {change:.1e} of its norm, "
                    "so this model's layers are not the standard kind: use --method rtn --rotate none"
                )

    @torch.no_grad()
    def logits(self, ends: Mapping[str, torch.Tensor]) -> None:
        """Compare the logits; ``ends`` has norm and head if a rotation has changed them."""
        for ours, stored in zip(self.transformed, self.plain, strict=True):
            expected = logits(self.loaded, stored.hidden)
            found = self._transformed_logits(ours.hidden.to(expected.device), ends)
            change = float((found - expected).abs().max() / expected.abs().max())
            if not change <= BOUND:
                raise UserError(
                    f"the transforms change the model's logits by {change:.1e} of their maximum: use --method rtn --rotate none"
                )

    def _transformed_logits(self, hidden: torch.Tensor, ends: Mapping[str, torch.Tensor]) -> torch.Tensor:
        decoder = self.loaded.decoder
        if not ends:
            return logits(self.loaded, hidden)
        normed: torch.Tensor = torch.func.functional_call(decoder.norm, {"weight": ends["norm.weight"].to(hidden)}, (hidden,))
        out: torch.Tensor = normed @ ends["lm_head.weight"].to(hidden).t()
        return out if decoder.head.bias is None else out + decoder.head.bias

    def _into_basis(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.residual is None else (hidden.double() @ self.residual.to(hidden.device)).to(hidden)
