"""Every weighting against a case computed by hand, for one sample and for several at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf.calibration.sensitivity import Sensitivity
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import FLOOR, KINDS, gradient, hessian_weights, modality, token, uniform
from mbq_gguf.calibration.token_weights.token import importance
from mbq_gguf.models.layouts import STANDARD

QKV, OUT, GATE_UP, DOWN = STANDARD.sites
VISION, ANSWER, PROMPT = [False, True, True, False, False], [False, False, False, False, True], [True, False, False, True, False]
LAYERS = 2


def stream(samples: int | None = None, salience: torch.Tensor | None = None) -> Streamed:
    """Prompt, vision, vision, prompt, answer; ``samples`` of them stacked where given."""
    vision, answer = torch.tensor(VISION), torch.tensor(ANSWER)
    if samples is not None:
        vision, answer = vision.expand(samples, -1), answer.expand(samples, -1)
    return Streamed(torch.zeros(samples or 1, 5, 8), [], torch.zeros(answer.shape, dtype=torch.int64), vision, answer, answer, salience)


def measured(**attention: list[float]) -> Sensitivity:
    """A sensitivity of two layers whose mlp block is three times as sensitive to vision as to answers and prompts."""
    mlp = {"vision": [3.0, 3.0], "answer": [1.0, 1.0], "prompt": [1.0, 1.0]}
    mean = {
        block: {name: torch.tensor(value).double() for name, value in part.items()}
        for block, part in (("attention", attention), ("mlp", mlp))
    }
    return Sensitivity(mean, {}, [])


SENSITIVITY = measured(vision=[0.5, 1.0], answer=[1.0, 2.0], prompt=[7.0, 4.0])


@pytest.mark.parametrize("samples", [None, 2])
def test_uniform(samples: int | None) -> None:
    weights = uniform(stream(samples), QKV)
    assert weights.shape == stream(samples).ids.shape
    assert (weights == 1).all()


@pytest.mark.parametrize("samples", [None, 2])
def test_modality(samples: int | None) -> None:
    ratios = {"attention": [9.0, 0.25], "mlp": [9.0, 4.0]}
    assert modality(ratios, 1)(stream(samples), OUT).reshape(-1, 5).tolist() == [[0, 0.25, 0.25, 0, 1]] * (samples or 1)
    assert modality(ratios, 1, prompt=0.5)(stream(samples), DOWN).reshape(-1, 5).tolist() == [[0.5, 4, 4, 0.5, 1]] * (samples or 1)


@pytest.mark.parametrize("samples", [None, 2])
def test_gradient(samples: int | None) -> None:
    # Layer 1, attention: 1 / 2 for vision, 4 / 2 for prompt text. Layer 1, mlp: 3 for vision.
    assert gradient(SENSITIVITY, 1)(stream(samples), QKV).reshape(-1, 5).tolist() == [[2, 0.5, 0.5, 2, 1]] * (samples or 1)
    assert gradient(SENSITIVITY, 1)(stream(samples), GATE_UP).reshape(-1, 5).tolist() == [[1, 3, 3, 1, 1]] * (samples or 1)


def test_gradient_is_bounded_and_needs_no_gradient() -> None:
    extreme = measured(vision=[1e-9, 1.0], answer=[1.0, 0.0], prompt=[1e9, 1.0])
    assert gradient(extreme, 0)(stream(), QKV).tolist() == pytest.approx([10, 0.1, 0.1, 10, 1])
    assert gradient(extreme, 1)(stream(), QKV).tolist() == [1] * 5  # no answer gradient


@pytest.mark.parametrize("samples", [None, 2])
def test_token(samples: int | None) -> None:
    salience = torch.zeros(LAYERS, len(STANDARD.sites), 5)
    salience[1, 2] = torch.tensor([1.0, 4.0, 9.0, 16.0, 0.0])  # roots 1, 2, 3, 4, 0 have the mean 2
    if samples is not None:
        salience = salience.expand(samples, -1, -1, -1)
    found = token(STANDARD, 1)(stream(samples, salience), GATE_UP)
    torch.testing.assert_close(found.reshape(-1, 5), torch.tensor([[0.5, 1, 1.5, 2, FLOOR]]).expand(samples or 1, -1))


def test_token_without_any_gradient_is_uniform() -> None:
    assert importance(torch.zeros(3, 4)).tolist() == [[1.0] * 4] * 3


@given(st.lists(st.floats(0, 1e10), min_size=1, max_size=30))
def test_importance_is_bounded_and_ignores_the_loss_unit(squares: list[float]) -> None:
    values = torch.tensor(squares, dtype=torch.float64)
    found = importance(values)
    assert ((found >= FLOOR) & (found <= 1 / FLOOR)).all()
    torch.testing.assert_close(importance(values * 64), found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_a_hessian_of_full_rank(kind: str) -> None:
    """Two vision, two prompt and one answer token span five channels; no kind may lose one, whatever the sensitivities."""
    extreme = measured(vision=[0.0, 0.0], answer=[1.0, 1.0], prompt=[0.0, 0.0])
    salience = torch.zeros(LAYERS, len(STANDARD.sites), 5)
    salience[..., 4] = 1e6
    weigh = hessian_weights(kind, STANDARD, 0, extreme, prompt=0.0, floor=False)  # type: ignore[arg-type]
    weights = weigh(stream(salience=salience), QKV)
    assert weights.min() >= FLOOR
    inputs = torch.eye(5)
    assert torch.linalg.matrix_rank(inputs.t() @ (inputs * weights[:, None])) == 5


def test_modality_of_a_hessian_takes_the_ratios_floor() -> None:
    weigh = hessian_weights("modality", STANDARD, 0, SENSITIVITY, prompt=1.0, floor=True)
    assert weigh(stream(), QKV).tolist() == [1, 0.5, 0.5, 1, 1]  # ratios 0.5 and 0.5, their median 0.5
