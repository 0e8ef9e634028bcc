"""Hadamard matrices for the widths of language models, and rotations with random signs made from them.

A Hadamard matrix H has entries +1 and -1 and H H^T = n I. Sylvester's doubling gives powers of two; Paley's two constructions give q + 1
and 2 (q + 1) for a prime q; Kronecker products of any of these are Hadamard matrices again. That covers every width in use:
576 = 16 * 36, 960 = 16 * 60, 1536 = 128 * 12, 3584 = 128 * 28, 8960 = 64 * 140, 18944 = 128 * 148, 29568 = 32 * 924.
"""

from __future__ import annotations

from functools import cache

import torch

from mbq_gguf.errors import UserError


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> torch.Tensor:
    """Q[i, j] = Legendre symbol of (i - j) modulo the prime ``q``."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[[x * x % q for x in range(1, q)]] = 1.0
    symbol[0] = 0.0
    index = torch.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


def _paley_one(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q = 3 mod 4."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:] = 1.0
    skew[1:, 0] = -1.0
    skew[1:, 1:] = _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> torch.Tensor:
    """Order 2 (q + 1) for a prime q = 1 mod 4."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1.0
    conference[1:, 0] = 1.0
    conference[1:, 1:] = _jacobsthal(q)
    unit = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, unit) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _elementary(n: int) -> torch.Tensor | None:
    """A Hadamard matrix of order ``n`` from a single construction, or None."""
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n - 1) and (n - 1) % 4 == 3:
        return _paley_one(n - 1)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return _paley_two(n // 2 - 1)
    return None


@cache
def factors(n: int) -> tuple[int, ...] | None:
    """Orders of elementary Hadamard matrices whose product is ``n``, with as many twos as possible; None if there are none."""
    if n == 1:
        return ()
    if n % 2 == 0 and (rest := factors(n // 2)) is not None:
        return (2, *rest)
    for order in range(4, n + 1, 4):
        if n % order == 0 and _elementary(order) is not None and (rest := factors(n // order)) is not None:
            return (order, *rest)
    return None


def hadamard(n: int) -> torch.Tensor:
    """The orthogonal matrix H / sqrt(n), float64 [n, n], for a Hadamard matrix H. Raises UserError if no construction gives order ``n``."""
    orders = factors(n)
    if orders is None:
        raise UserError(f"no construction gives a Hadamard matrix of order {n}: use --rotate none")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in orders:
        factor = _elementary(order)
        assert factor is not None
        matrix = torch.kron(matrix, factor)
    matrix /= n**0.5
    return matrix


def random_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """diag(random signs) times :func:`hadamard`, float64 [n, n] (QuaRot, arXiv 2404.00456, section 3)."""
    rotation: torch.Tensor = random_signs(n, generator)[:, None] * hadamard(n)
    return rotation


def random_signs(n: int, generator: torch.Generator) -> torch.Tensor:
    """``n`` random signs, float64."""
    return torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1


def block_size(n: int, largest: int = 512) -> int:
    """The block size of the online transform before down_proj: the largest power of two that divides ``n``, at most ``largest``.

    ggml's fast Walsh-Hadamard transform supports 64 to 512 on CUDA, and any power of two on the CPU.
    """
    return min(n & -n, largest)
