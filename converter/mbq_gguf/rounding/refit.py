"""Given the codes, the best scales and offsets are a least-squares problem: one small linear system a row.

For a row w with codes q, block g contributes s_g q_g + o_g. With F the matrix whose rows are the blocks' codes and indicators, the output
error (w - F^T p) H (w - F^T p)^T is least where F H F^T p = F H w. In turn with descent.py, which moves the codes, this lowers GPTQ's own
objective step by step.
"""

from __future__ import annotations

import torch

from mbq_gguf.formats.grid import Grid, Pair, to_f16
from mbq_gguf.rounding.gptq import upper_factor

ROWS_AT_ONCE = 256
RIDGE = 1e-4  # of each diagonal entry: blocks whose codes are all alike cannot tell scale from offset


@torch.no_grad()
def refit(grid: Grid, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor) -> Pair:
    """Better ``scale`` and ``offset`` [rows, blocks] (as ``grid`` holds them) for ``codes`` and ``weight`` [rows, columns].

    A row keeps what it had where rounding the solution makes its objective worse, or a scale is not positive.
    """
    new_scale, new_offset = scale.clone(), offset.clone()
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        new_scale[rows], new_offset[rows] = _refit_rows(grid, weight[rows].float(), codes[rows], scale[rows], offset[rows], hessian.float())
    return new_scale, new_offset


def _refit_rows(
    grid: Grid, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor
) -> Pair:
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
    new_scale, new_offset = _held_in_turn(grid, scale, offset, system + torch.diag_embed(ridge), right)
    change = torch.cat([new_scale - scale, new_offset - offset], 1).double()
    gain = (change * (2 * right - torch.einsum("rij,rj->ri", system, change))).sum(dim=1)  # how much less the error is
    better = (gain > 0) & (new_scale > 0).all(dim=1) & new_offset.isfinite().all(dim=1)
    return torch.where(better[:, None], new_scale, scale), torch.where(better[:, None], new_offset, offset)


def _held_in_turn(grid: Grid, scale: torch.Tensor, offset: torch.Tensor, system: torch.Tensor, right: torch.Tensor) -> Pair:
    """``scale`` and ``offset`` moved by the solution of ``system`` [rows, 2 blocks, 2 blocks], rounded one number after the other.

    What rounding one misses is made good by those behind it, as in GPTQ: with heads of 16 bits 0.83 to 0.95 of the objective that rounding
    all at once gives, with fp16 numbers the same.
    """
    blocks = scale.shape[1]
    order = torch.arange(2 * blocks, device=scale.device).view(2, blocks).t().reshape(-1)  # each scale before its offset
    ordered = system[:, order][:, :, order]
    factor = upper_factor(ordered, check=False)  # a row without one gets nonsense, which its caller finds no better than what it had
    step = (factor.mT @ (factor @ right[:, order, None]))[..., 0]
    new_scale, new_offset = torch.empty_like(scale), torch.empty_like(offset)
    for index in range(2 * blocks):
        block = index // 2
        if index % 2 == 0:
            wanted, had = scale[:, block] + step[:, index], scale[:, block]
            new = new_scale[:, block] = grid.held(wanted.float(), offset[:, block])[0]
        else:
            wanted, had = offset[:, block] + step[:, index], offset[:, block]
            new = new_offset[:, block] = grid.held(new_scale[:, block], wanted.float())[1]
        missed = (step[:, index] - (new - had)) / factor[:, index, index]
        step[:, index:] -= missed[:, None] * factor[:, index, index:]
    return new_scale, new_offset


@torch.no_grad()
def refit_row_scale(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Better ``scale`` [rows, 1], one fp16 number a row and no offset: q H w / q H q for ``codes`` and ``weight`` [rows, columns].

    A row keeps what it had where fp16 makes its objective no better.
    """
    pull = codes @ hessian.float()
    curvature = (pull * codes).sum(dim=1, keepdim=True)
    slope = (pull * (weight.float() - codes * scale)).sum(dim=1, keepdim=True)
    found = to_f16(scale + torch.where(curvature > 0, slope / curvature, 0.0))
    step = found - scale
    return torch.where(step * (2 * slope - step * curvature) > 0, found, scale)


def _values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(size, 1) + offset.repeat_interleave(size, 1)
