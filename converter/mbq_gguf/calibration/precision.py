"""Runs matrix products and attention of calibration in fewer bits than float32, as in the model's own training and use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """While open, float32 matrices on ``device`` are multiplied in fewer bits and summed in float32: in bfloat16 on CPUs that are faster
    with it, in TF32 on GPUs, which keeps 11 bits of a number (bfloat16 keeps 8).

    Only for running the model and summing moments over tokens, never for rounding. A CPU reaches 330 to 400 GFLOPS instead of 115 to 130
    with the shapes of the reference VLM (2 cores with AMX).
    """
    on_cpu = device.type == "cpu"
    if on_cpu and not fast_bfloat16():
        yield
        return
    products = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]  # made at import
    before, products.fp32_precision = products.fp32_precision, "bf16" if on_cpu else "tf32"
    try:
        with _Attention() if on_cpu else nullcontext():  # it takes some microseconds of every operation
            yield
    finally:
        products.fp32_precision = before


class _Attention(TorchFunctionMode):
    """Converts attention to bfloat16 as a whole. Otherwise each of its many small products would be converted separately, which takes 54 ms
    instead of 8 (16 in float32) for 16 texts of 128 tokens.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and kwargs.get("attn_mask") is None and _converted(args[0]):
            return func(*(x.bfloat16() for x in args), **kwargs).float()
        return func(*args, **kwargs)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: if it has AMX. A core with only AVX512-BF16 reaches 89 to 105 GFLOPS in
    bfloat16 and 119 to 200 in float32.
    """
    return torch.cpu._is_amx_tile_supported()


def _converted(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and fast_bfloat16()
