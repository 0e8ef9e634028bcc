"""Rotations do not change the function: checked in float64 on the tiny VLM."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import capture, working_layer
from mbq_gguf.errors import UsageError
from mbq_gguf.models import LoadedModel
from mbq_gguf.transforms import rotation
from mbq_gguf.transforms.rotation import block_hadamard, draw, rotate_layer, rotate_output, rotated_embeddings, widest_rotation
from torch import nn

BOUND = 1e-6  # relative; measured 1e-7: transformers' RMSNorm computes in float32 whatever it is given, the rest here is float64


def doubled(value: Any) -> Any:
    """Tensors of floats, however deep, in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(doubled(item) for item in value)
    return value


@torch.no_grad()
@pytest.mark.parametrize("rotate", ["offline", "full"])
def test_a_rotated_layer_gives_the_rotated_output(tiny: LoadedModel, samples: list[Sample], rotate: Literal["offline", "full"]) -> None:
    rotation = draw(tiny.decoder, rotate, seed=3)
    stream = next(capture(tiny, samples))
    for index in range(len(tiny.decoder.layers)):
        hidden, kwargs = stream.hidden.double(), doubled(stream.kwargs[index])
        plain_layer, layer = working_layer(tiny, index), working_layer(tiny, index)
        plain_layer.module.double()
        layer.module.double()
        plain = plain_layer.run(hidden, kwargs)
        rotate_layer(layer, rotation)
        turned = layer.run(hidden @ rotation.residual, kwargs)
        assert float((turned @ rotation.residual.t() - plain).norm() / plain.norm()) < BOUND
        assert float(layer.part("input_layernorm").weight.std()) == 0.0


@torch.no_grad()
def test_the_ends_undo_the_rotation(tiny: LoadedModel) -> None:
    rotation = draw(tiny.decoder, "offline", seed=3)
    ends = rotated_embeddings(tiny.decoder, rotation)
    ids = torch.tensor([5, 17, 900])
    embedded = tiny.decoder.embed_tokens(ids)
    residual = rotation.residual.float()
    torch.testing.assert_close(ends["embed_tokens.weight"][ids] @ residual.t(), embedded, rtol=1e-4, atol=1e-5)
    hidden = torch.randn(3, embedded.shape[1], generator=torch.Generator().manual_seed(0))
    rms = hidden * hidden.square().mean(-1, keepdim=True).add(1e-5).rsqrt()  # 1e-5: the configuration's epsilon
    plain = tiny.decoder.head(tiny.decoder.norm(hidden))
    torch.testing.assert_close((rms @ residual) @ ends["lm_head.weight"].t(), plain, rtol=1e-3, atol=1e-4)


def test_a_projector_writes_the_rotated_basis() -> None:
    module = nn.Linear(8, 12).double()
    residual = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(5, 8, dtype=torch.float64)
    plain = module(x).detach()
    rotate_output(module, residual)
    torch.testing.assert_close(module(x).detach(), plain @ residual)


def test_the_online_transform_is_its_own_inverse() -> None:
    x = torch.randn(3, 192, dtype=torch.float64)
    torch.testing.assert_close(block_hadamard(block_hadamard(x, 64), 64), x)


def test_norms_with_a_mean_do_not_let_a_rotation_pass(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.decoder, "norm", nn.LayerNorm(128))
    with pytest.raises(UsageError, match="--rotate none"):
        draw(tiny.decoder, "offline", seed=0)
    assert widest_rotation(tiny) == "none"


def test_the_widest_rotation_is_what_the_widths_allow(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert widest_rotation(tiny) == "full"
    monkeypatch.setattr(rotation, "block_size", lambda width: 1)  # an odd width
    assert widest_rotation(tiny) == "offline"
    draw(tiny.decoder, widest_rotation(tiny), seed=0)  # type: ignore[arg-type]
