"""Matrices that have no factor are told of at once, or later."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.errors import UserError
from mbq_gguf.rounding.inverse import check_factored, faults_later, inverse_factor

SOUND = torch.eye(4)
UNSOUND = [torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])), torch.full((4, 4), torch.nan), torch.full((4, 4), torch.inf)]


@pytest.mark.parametrize("hessian", UNSOUND)
def test_no_factor(hessian: torch.Tensor) -> None:
    with pytest.raises(UserError, match="not positive definite"):
        inverse_factor(hessian, 0.01)
    with faults_later() as faults:
        inverse_factor(SOUND, 0.01)
        check_factored(faults)
        inverse_factor(hessian, 0.01)
    with pytest.raises(UserError, match="not positive definite"):
        check_factored(faults)
    assert len(faults) == 2
    with pytest.raises(UserError, match="not positive definite"):  # at once again
        inverse_factor(hessian, 0.01)
