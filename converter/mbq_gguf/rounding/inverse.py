"""The Cholesky factor of the inverse Hessian that GPTQ uses; shared by all processes, and without making the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mbq_gguf import parallel
from mbq_gguf.errors import UserError
from mbq_gguf.memory import to_host
from mbq_gguf.rounding.cholesky import cholesky

# Columns of the inverse factor per piece: all of them in float64 would take 2.9 GB for 18944 columns. Pieces skip zeros, and small ones
# skip more: on a CPU, 1536 columns take 80 ms instead of 108. A GPU is better at large products. A factor in blocks takes two of
# them at a time.
COLUMNS_SOLVED = {"cpu": 256, "cuda": 2048}

_later: list[list[torch.Tensor]] = []


def damped(hessian: torch.Tensor, damping: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """H + damping * mean(diag H) * I in ``dtype``; the diagonal is computed in float64.

    Channels that are always 0 (zero diagonal) get the mean diagonal, so that they are rounded to nearest.
    """
    matrix = hessian.to(dtype, copy=True)
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)  # no branch: the host would wait for a GPU
    matrix.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + damping * mean)
    return matrix


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [columns, columns] float32 with damped(H)^-1 = U^T U, upper triangular; factored in float64.

    If L L^T is the matrix with rows and columns reversed, U is L^-1 reversed. Several processes share the factorisation and each solves for
    some of the columns, so all of them must call this. Raises UserError if the matrix is not positive definite, but see
    :func:`faults_later`.
    """
    found = cholesky(damped(hessian, damping).flip(0, 1))
    fault = (found.info != 0) | ~found.lower.diagonal().isfinite().all()  # not every library reports NaN
    if _later:
        _later[-1].append(to_host(fault))
    else:
        check_factored([fault])
    factor = torch.zeros_like(hessian, dtype=torch.float32)
    at_once = 2 * len(found.inverses[0]) if found.inverses else COLUMNS_SOLVED["cpu" if hessian.device.type == "cpu" else "cuda"]
    heights = range(len(hessian), 0, -at_once)  # of the pieces of L^-1, without the zeros above

    def solved(piece: int) -> torch.Tensor:
        columns = min(at_once, heights[piece])
        return found.inverse(len(hessian) - heights[piece], columns).flip(0, 1).float()

    for piece, part in parallel.balanced_map([height**2 * min(at_once, height) for height in heights], solved):
        factor[: heights[piece], max(heights[piece] - at_once, 0) : heights[piece]] = part
    return factor


@contextmanager
def faults_later() -> Iterator[list[torch.Tensor]]:
    """Defer errors for matrices that are not positive definite, since checking at once makes the host wait for the GPU. The list yielded
    is for :func:`check_factored`, once its tensors have arrived on the host."""
    _later.append([])
    try:
        yield _later[-1]
    finally:
        _later.pop()


def check_factored(faults: Sequence[torch.Tensor]) -> None:
    """Raise UserError if one of ``faults`` is true."""
    if any(bool(fault) for fault in faults):
        raise UserError("the second moments of a layer's inputs are not positive definite: the model's activations are not finite")
