"""Support for `trial_rows.py --list w4a8`: its rows, the loss that int8 activations add, and two experimental types that no file has.

W4A8_ZERO gives the codes 0 to 15 of a row a real-valued minimum (the product would need a sum over the activations). W4A8_TWO gives a row
of symmetric codes an int4 scale per 64 weights within one scale per row, so that scale times code is an int8. Both store the float32
values themselves, so their bits per weight are meaningless.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.grid import Grid, Parameter, grid_of
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType
from mbq_gguf.rounding import nearest, sequence
from mbq_gguf.rounding.gptq import code_gptq
from mbq_gguf.transforms import candidate

NEAREST = "rounding=nearest,synthetic=0,propagate_error=False,samples=128,turns=last"
GROUP = 64  # weights of one int4 scale in W4A8_TWO; divides the reference VLM's 576 and 1536
RESAMPLES = 2000
STORE = Path(__file__).resolve().parents[1] / "docs" / "results" / "w4a8.json"
KINDS = {"scenes": ".4f", "photographs": ".3f", "text": ".3f"}  # and the places of their figures in the table

VARIANTS = (
    *("type_name=W4A8", "type_name=W4A8,rotate=full", "type_name=W4A8,rotate=offline"),
    *(f"type_name=W4A8,{NEAREST},method={method}" for method in ("smoothquant", "awq", "mbq")),
    *(f"type_name={kind},rotate={rotate}" for rotate in ("full", "none") for kind in ("W4A8_ZERO", "W4A8_TWO")),
    *(f"type_name=W4A8,rotate={rotate},refits={refits}" for rotate in ("full", "none") for refits in (0, 1)),
    *("type_name=W4A8,method=mbq", "type_name=W8A8", "type_name=Q4_0"),
)
ROWS = [f"type_name={kind},{NEAREST},method=rtn" for kind in ("W4A8", "W8A8")] + [
    f"{variant},seed={seed}" for variant in VARIANTS for seed in (0, 1)
]


def register() -> None:
    """Register the two trial types with the converter, in this process."""
    for name in ("W4A8_ZERO", "W4A8_TWO"):
        row_scale.QUANT_TYPES[name] = QuantType(name, -1, GROUP, 4 * GROUP, partial(_quantize, name), _dequantize, "F16")
    for module in (sequence, candidate, nearest):
        module.grid_of = trial_grid  # type: ignore[attr-defined]


def trial_grid(quant_type: QuantType) -> Grid | None:
    """The grid of a trial type, whose block is a row, or of any other type."""
    columns = quant_type.block_size
    if quant_type.name == "W4A8_ZERO":
        return Grid(columns, columns, 0, 15, partial(_pack, 0))
    if quant_type.name == "W4A8_TWO":
        return Grid(columns, GROUP, -8, 7, partial(_pack, -8), Parameter(0, 15), Parameter(0, 0))
    return grid_of(quant_type)


def _pack(low: int, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, _steps: torch.Tensor) -> torch.Tensor:
    groups = codes.float().reshape(*scale.shape, -1) + low
    values = groups * scale[..., None] + offset[..., None]
    return values.reshape(len(codes), -1).view(torch.uint8)


def _quantize(name: str, weights: Floats) -> Bytes:
    grid = trial_grid(row_scale.for_rows(name, weights.shape[1]))
    assert grid is not None
    return code_gptq(torch.from_numpy(weights), torch.eye(weights.shape[1]), grid).rounded(grid).data  # no column makes good for another


def _dequantize(data: Bytes) -> Floats:
    return data.view("f4")


def added(plain: list[torch.Tensor], int8: list[torch.Tensor]) -> dict[str, Any]:
    """How much int8 activations add to the divergence of the same weights, as a share of it; the 95 % interval is from a paired bootstrap
    over questions.

    ``plain`` and ``int8`` have each question's divergences, one per token, with 16-bit and with int8 activations.
    """
    both = torch.stack([torch.stack([p.sum(), q.sum()]) for p, q in zip(plain, int8, strict=True)]).double()
    drawn = torch.randint(len(both), (RESAMPLES, len(both)), generator=torch.Generator().manual_seed(0))
    shares = both[drawn].sum(dim=1)
    low, high = torch.quantile(shares[:, 1] / shares[:, 0] - 1, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"added": float(both[:, 1].sum() / both[:, 0].sum() - 1), "from": low, "to": high}


def render(rows: list[dict[str, Any]]) -> str:
    """The stored rows as the table of docs/results.md: with 16-bit / with int8 activations (what int8 adds)."""
    lines = ["| quantised with | exact match | KLD, scenes | photographs | text |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        name = row["row"].replace(NEAREST, "nearest").removeprefix("type_name=").replace(",", ", ")
        exact = _pair(row["scenes"], "exact", ".3f")
        scores = [_pair(row[kind], "kld", places) + _share(row[kind]) for kind, places in KINDS.items()]
        lines.append(f"| {name} | {exact} | {' | '.join(scores)} |")
    return "\n".join(lines)


def _pair(found: dict[str, Any], figure: str, places: str) -> str:
    return " / ".join(format(part[figure], places) for part in (found, found.get("int8")) if part)


def _share(found: dict[str, Any]) -> str:
    """What int8 adds, with its interval; as a multiple if the weights alone lose almost nothing."""
    int8 = found.get("int8")
    if not int8:
        return ""
    return f" ({int8['added']:+.2f}: {int8['from']:+.2f} to {int8['to']:+.2f})" if int8["from"] < 10 else " (many times)"
