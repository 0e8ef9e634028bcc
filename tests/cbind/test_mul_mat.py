"""One product on a backend against float64, within the error of rounding the activations."""

from __future__ import annotations

import numpy as np
import pytest
from mbq_cbind import types
from mbq_cbind.errors import CallError
from mbq_cbind.graph import devices
from mbq_cbind.mul_mat import mul_mat
from mbq_gguf.formats.quant_type import Floats

HALF_STEP = 0.5  # an int8 activation is off by half a step at most ...
FP16_STEP = 127 * 2.0**-11  # ... and by the rounding of the step to fp16, which 127 steps feel 127 times
FP16_SUM = 2.0**-10  # Q8_1's block sum s, off by its own rounding to fp16 and by the step's
FP16_ROUNDING = 2.0**-11  # of activations that meet fp16 weights
FLOAT_SUM = 2.0**-24  # one float32 addition

BLOCKS = {"MBQ3": 128, "MBQ3_64": 64, "MBQ3S": 128, "MBQ3S_64": 64, "Q4_0": 32, "Q8_0": 32, "F16": 1}
SHAPES = [(rows, columns) for rows in (1, 3, 33) for columns in (64, 128, 576, 896, 1536, 8960)]
CASES = [(kind, *shape) for kind, block in BLOCKS.items() for shape in SHAPES if shape[1] % block == 0]
ACTIVATION_ROWS = (1, 5, 19)  # one token, and batches that take other kernels
MANY_ROWS = 100  # and another one on a GPU: fp16 there, with less rounding than int8
WIDE = (8200, 896, 290)  # rows, columns and activations that make a GPU of up to 140 multiprocessors take 256 activations at once


def check(kind: str, rows: int, columns: int, device: str, batches: tuple[int, ...] = ACTIVATION_ROWS) -> None:
    random = np.random.default_rng(rows * columns)
    weights = random.normal(size=(rows, columns)).astype(np.float32)
    packed = types.quantize(kind, weights)
    stored = types.dequantize(kind, packed, columns).astype(np.float64)
    for n in batches:
        x = random.normal(size=(n, columns)).astype(np.float32)
        exact = x.astype(np.float64) @ stored.T
        error = np.abs(mul_mat(kind, packed, columns, x, device=device, threads=2) - exact)
        assert np.all(error <= bound(kind, stored, x)), f"{n} activations: {(error / bound(kind, stored, x)).max():.3g} times the bound"


def bound(kind: str, stored: np.ndarray, x: Floats) -> np.ndarray:
    """The largest error of each product [n, rows] that the kernel's arithmetic allows.

    Activations are rounded to int8 with one step for 32 of them, step = max |x| / 127; with fp16 weights, to fp16. MBQ3 adds its minimum
    times the block sum of the rounded activations, which Q8_1 keeps in fp16: |minimum| is at most max |w| of the block. The sums run in
    float32, in any order.
    """
    sums = x.shape[1] * FLOAT_SUM * (np.abs(x) @ np.abs(stored).T)
    if kind == "F16":
        return sums + FP16_ROUNDING * (np.abs(x) @ np.abs(stored).T)
    pieces = x.astype(np.float64).reshape(len(x), -1, 32)
    step = np.abs(pieces).max(-1) / 127
    weight = np.abs(stored).reshape(len(stored), -1, 32)
    rounding = (HALF_STEP + FP16_STEP) * step @ weight.sum(-1).T
    if kind.startswith("MBQ3"):
        rounding += FP16_SUM * (np.abs(pieces.sum(-1)) + 16 * step) @ weight.max(-1).T
    return rounding + sums


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
def test_product_on_the_cpu(kind: str, rows: int, columns: int) -> None:
    check(kind, rows, columns, "CPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
def test_product_on_cuda(kind: str, rows: int, columns: int) -> None:
    many = (MANY_ROWS,) if kind.startswith("MBQ3") else ()
    check(kind, rows, columns, "CUDA0", ACTIVATION_ROWS + many)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["MBQ3", "MBQ3_64", "MBQ3S", "MBQ3S_64"])
def test_wide_product_on_cuda(kind: str) -> None:
    rows, columns, n = WIDE
    check(kind, rows, columns, "CUDA0", (n,))


def test_threads_do_not_change_the_product() -> None:
    x = np.random.default_rng(0).normal(size=(9, 1536)).astype(np.float32)
    packed = types.quantize("MBQ3", np.random.default_rng(1).normal(size=(33, 1536)).astype(np.float32))
    assert np.array_equal(mul_mat("MBQ3", packed, 1536, x, threads=1), mul_mat("MBQ3", packed, 1536, x, threads=3))


def test_unknown_device_is_named() -> None:
    with pytest.raises(CallError, match=r"no device QUANTUM0: choose one of .*CPU"):
        mul_mat("F32", np.zeros((1, 128), np.uint8), 32, np.zeros((1, 32), np.float32), device="QUANTUM0")
    assert "CPU" in devices()


def test_shapes_must_belong_together() -> None:
    with pytest.raises(CallError, match="do not belong to 64 columns"):
        mul_mat("F32", np.zeros((1, 256), np.uint8), 64, np.zeros((1, 32), np.float32))
