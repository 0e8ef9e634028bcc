"""How candidates are rounded: GPTQ with the Hessian of the scaled inputs, computed by hand."""

from __future__ import annotations

import pytest
import torch
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.rounding.sequence import Refinement
from mbq_gguf.transforms.candidate import by_gptq, by_nearest

PLAIN = Refinement(damping=1e-4, clip=False, error_correction=0.0, refits=0)


def test_error_is_made_good_in_the_scaled_inputs_basis() -> None:
    # Scale 1 and minimum 0 in both blocks of 64. Inputs 0 and 1 are always equal; once input 1 is halved, 0.4 too little in column 0 takes
    # 0.8 in column 1 to make good: 2.9 becomes 3.7, and 4. The unscaled Hessian would give 3.3, and 3, as rounding to nearest does.
    scaled = torch.arange(128.0).remainder(8)[None].clone()
    scaled[0, :2] = torch.tensor([2.4, 2.9])
    hessian, factors = torch.eye(128), torch.ones(128)
    hessian[0, 1] = hessian[1, 0] = 1.0
    factors[1] = 2.0
    kept = [quant_type("MBQ3_64")]
    (found,) = by_gptq(kept, hessian, PLAIN)([scaled], factors)
    (unscaled,) = by_gptq(kept, hessian, PLAIN)([scaled], torch.ones(128))
    (nearest,) = by_nearest(kept)([scaled], factors)
    assert found[0, :2].tolist() == [2.0, 4.0]
    assert unscaled[0, :2].tolist() == nearest[0, :2].tolist() == [2.0, 3.0]
    assert torch.equal(found[0, 2:], scaled[0, 2:])


@pytest.mark.parametrize("names", [("MBQ3", "MBQ3"), ("MBQ3", "MBQ3_64"), ("MBQ3_64", "F16", "MBQ3_64")])
def test_inputs_without_correlation_are_rounded_to_nearest(names: tuple[str, ...]) -> None:
    # With a diagonal Hessian no column can make good another's error; F16 has no grid.
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(3 + number, 256, generator=generator) for number in range(len(names))]
    diagonal, factors = torch.rand(256, generator=generator) + 0.1, torch.rand(256, generator=generator) + 0.5
    kept = [quant_type(name) for name in names]
    found = by_gptq(kept, diagonal.diag(), PLAIN)(weights, factors)
    for values, expected in zip(found, by_nearest(kept)(weights, factors), strict=True):
        torch.testing.assert_close(values, expected)
