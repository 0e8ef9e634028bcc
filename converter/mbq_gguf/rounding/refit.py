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
    split = codes.view(rows, blocks, -1)
    tiles = hessian.view(blocks, split.shape[2], blocks, -1)
    by_scale = torch.einsum("rgb,gbhc->grhc", split, tiles)  # F H, rows that belong to scales
    ss = torch.einsum("grhc,rhc->rgh", by_scale, split)
    so = by_scale.sum(dim=3).transpose(0, 1)
    oo = tiles.sum(dim=(1, 3)).expand(rows, blocks, blocks)
    system = torch.cat([torch.cat([ss, so], 2), torch.cat([so.transpose(1, 2), oo], 2)], 1).double()
    pull = ((weight - _values(codes, scale, offset)) @ hessian).view_as(split)
    right = torch.cat([(pull * split).sum(dim=2), pull.sum(dim=2)], 1).double()
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    step = torch.linalg.solve(system + torch.diag_embed(ridge), right).float()
    new_scale, new_offset = to_f16(scale + step[:, :blocks]), to_f16(offset + step[:, blocks:])
    change = torch.cat([new_scale - scale, new_offset - offset], 1).double()
    gain = (change * (2 * right - torch.einsum("rij,rj->ri", system, change))).sum(dim=1)  # how much less the error is
    better = (gain > 0) & (new_scale > 0).all(dim=1) & new_offset.isfinite().all(dim=1)
    return torch.where(better[:, None], new_scale, scale), torch.where(better[:, None], new_offset, offset)


def _values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(size, 1) + offset.repeat_interleave(size, 1)
