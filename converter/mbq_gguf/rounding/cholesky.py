"""A Cholesky factorisation in blocks, whose rows several processes share, and columns of the factor's inverse.

cuSolver factors a matrix of 18944 columns on an H200 in 62 ms, and two GPUs would each spend that. Here each process updates its own blocks
of rows and sends the others what they need. The blocks on the diagonal, which depend on one another, are factored by all processes, while
the updates of the step before still run. Two GPUs then need 52 ms, and one 63. The inverse of L is computed by products with the inverses
of these blocks, which are known anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from mbq_gguf import parallel

# Columns of a block. With 1536 two GPUs need 50 ms, but a single one 68. On a CPU several processes are for tests only.
WIDTH = {"cpu": 1 << 30, "cuda": 1024}
LEAST = 4  # a matrix of at most so many blocks is left to the library, which takes 1.9 ms for 3584 columns


@dataclass(frozen=True)
class Factor:
    """L in the lower triangle of ``lower`` [n, n] (above it anything) and LAPACK's ``info``, which is not 0 if there is no L. If L was
    computed in blocks, ``inverses`` are those of the blocks on the diagonal."""

    lower: torch.Tensor
    info: torch.Tensor
    inverses: tuple[torch.Tensor, ...] = ()

    def inverse(self, first: int, columns: int) -> torch.Tensor:
        """``columns`` columns of L^-1 from column ``first``, the first of a block, without the rows above ``first``, which are zero."""
        lower = self.lower[first:, first:]
        found = lower.new_zeros(len(lower), columns)
        found.fill_diagonal_(1.0)
        if not self.inverses:
            solved: torch.Tensor = torch.linalg.solve_triangular(lower, found, upper=False)
            return solved
        width = len(self.inverses[0])
        for start in range(0, len(lower), width):
            here = slice(start, min(start + width, len(lower)))
            known = slice(0, min(here.stop, columns))  # later columns of these rows are zero
            rest = found[here, known].addmm_(lower[here, :start], found[:start, known], alpha=-1)
            found[here, known] = self.inverses[(first + start) // width] @ rest
        return found


def cholesky(matrix: torch.Tensor) -> Factor:
    """The factor of ``matrix`` [n, n], which is overwritten. All processes must call this, with the same ``matrix``."""
    width = WIDTH["cpu" if matrix.device.type == "cpu" else "cuda"]
    if len(matrix) <= LEAST * width:
        return Factor(*torch.linalg.cholesky_ex(matrix))
    rows = [slice(start, min(start + width, len(matrix))) for start in range(0, len(matrix), width)]
    own = set(parallel.own_pieces(len(rows)))
    infos, inverses = [], []
    ahead = _ahead(matrix.device, partial(_block, matrix[rows[0], rows[0]]))
    for step, here in enumerate(rows):
        matrix[here, here], inverse, info = ahead()
        inverses.append(inverse)
        infos.append(info)
        below = range(step + 1, len(rows))
        for number in own.intersection(below):
            matrix[rows[number], here] = matrix[rows[number], here] @ inverse.t()
        _complete(matrix, rows, below, here)
        for number in below[:1]:
            if number in own:
                _update(matrix, rows[number], here)
            ahead = _ahead(matrix.device, partial(_next, matrix, rows, number))
        for number in sorted(own.intersection(below[1:])):
            _update(matrix, rows[number], here)
    return Factor(matrix, torch.stack(infos).abs().amax(), tuple(inverses))


Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _block(matrix: torch.Tensor) -> Block:
    """L of a block on the diagonal, the inverse of L, and info."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return lower, torch.linalg.solve_triangular(lower, unit, upper=False), info


def _next(matrix: torch.Tensor, rows: list[slice], number: int) -> Block:
    """The :func:`_block` with this number, which is first sent to all by the process that has its rows."""
    _complete(matrix, rows, range(number, number + 1), rows[number])
    return _block(matrix[rows[number], rows[number]])


def _update(matrix: torch.Tensor, row: slice, done: slice) -> None:
    """Subtract the product of columns ``done`` of L from the later columns of a block of rows, up to the diagonal."""
    rest = slice(done.stop, row.stop)
    matrix[row, rest].addmm_(matrix[row, done], matrix[rest, done].t(), alpha=-1)


def _complete(matrix: torch.Tensor, rows: list[slice], numbers: range, columns: slice) -> None:
    """Send ``columns`` of the blocks of rows with these ``numbers`` from the process that has them to all."""
    parallel.gather_pieces([matrix[row if number in numbers else slice(0), columns] for number, row in enumerate(rows)])


def _ahead(device: torch.device, make: Callable[[], Block]) -> Callable[[], Block]:
    """Start ``make`` after everything launched so far, and beside what is launched from now on, until its result is asked for."""
    if device.type != "cuda":
        made = make()
        return lambda: made
    stream, main = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        found = make()

    def joined() -> Block:
        main.wait_stream(stream)
        return found

    return joined


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all factors: its memory is reused only by what follows in it, which waits for everything that has read that memory."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
