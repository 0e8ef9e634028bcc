"""Given the codes, the best scales and offsets are a least-squares problem: one small linear system a row.

For a row w with codes q, block g contributes s_g q_g + o_g. With F the matrix whose rows are the blocks' codes and indicators, the output
error (w - F^T p) H (w - F^T p)^T is least where F H F^T p = F H w. GPTQ's codes with refitted parameters, then GPTQ again with these
parameters held fixed, is coordinate descent on GPTQ's own objective.
"""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import to_f16

ROWS_AT_ONCE = 256
RIDGE = 1e-4  # of each diagonal entry: blocks whose codes are all alike cannot tell scale from offset


@torch.no_grad()
def refit(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Better ``scale`` and ``offset`` [rows, blocks] (fp16 values in float32) for ``codes`` and ``weight`` [rows, columns].

    A row keeps what it had where rounding the solution to fp16 makes its objective worse, or a scale is not positive.
    """
    new_scale, new_offset = scale.clone(), offset.clone()
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        new_scale[rows], new_offset[rows] = _refit_rows(weight[rows].float(), codes[rows], scale[rows], offset[rows], hessian.float())
    return new_scale, new_offset


def _refit_rows(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, blocks = scale.shape
    size = weight.shape[1] // blocks
    split = codes.view(rows, blocks, size)
    by_scale = torch.einsum("rgb,gbn->rgn", split, hessian.view(blocks, size, -1))  # F H, rows that belong to scales
    by_offset = hessian.view(blocks, size, -1).sum(dim=1)  # and to offsets: the same for every row
    ss = torch.einsum("rghb,rhb->rgh", by_scale.view(rows, blocks, blocks, size), split)
    so = by_scale.view(rows, blocks, blocks, size).sum(dim=3)
    oo = by_offset.view(blocks, blocks, size).sum(dim=2).expand(rows, blocks, blocks)
    system = torch.cat([torch.cat([ss, so], 2), torch.cat([so.transpose(1, 2), oo], 2)], 1).double()
    error = weight - _values(codes, scale, offset)
    right = torch.cat([torch.einsum("rgn,rn->rg", by_scale, error), error @ by_offset.t()], 1).double()
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    step = torch.linalg.solve(system + torch.diag_embed(ridge), right).float()
    new_scale, new_offset = to_f16(scale + step[:, :blocks]), to_f16(offset + step[:, blocks:])
    new_error = weight - _values(codes, new_scale, new_offset)
    better = _objective(new_error, hessian) < _objective(error, hessian)
    better &= (new_scale > 0).all(dim=1) & new_offset.isfinite().all(dim=1)
    return torch.where(better[:, None], new_scale, scale), torch.where(better[:, None], new_offset, offset)


def _values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(size, 1) + offset.repeat_interleave(size, 1)


def _objective(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((error @ hessian) * error).sum(dim=1)
