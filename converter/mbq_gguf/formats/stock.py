"""Quant types for the ggml types that every llama.cpp reads.

The built ggml quantises them, if there is one (``ggml_quantize_chunk``); otherwise the gguf package's numpy code, which supports fewer
types and gives the same bytes for those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mbq_gguf.errors import USER_ERRORS, UserError
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType
from mbq_gguf.llama_cpp.bindings import bind

# Fallbacks for rows that are not a whole number of blocks: llama-quantize's choices (tensor_type_fallback), and finally F16.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "IQ4_NL": "F16",
    "Q4_0": "F16",
    "Q4_1": "F16",
    "Q5_0": "F16",
    "Q5_1": "F16",
    "Q8_0": "F16",
}
UNQUANTISED = ("F32", "F16", "BF16")
NAMES = (*UNQUANTISED, *FALLBACKS)


def stock_type(name: str) -> QuantType:
    """The quant type of one of :data:`NAMES`."""
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    quantize, dequantize = _by_ggml(name, block, size) or _by_gguf(gguf, name, kind)
    return QuantType(name, int(kind), block, size, quantize, dequantize, FALLBACKS.get(name))


Functions = tuple[Callable[[Floats], Bytes], Callable[[Bytes], Floats]]


def _by_ggml(name: str, block: int, size: int) -> Functions | None:
    """ggml's own functions, or None if nothing is built."""
    from mbq_cbind import types

    try:
        bind()
        types.type_info(name)
    except USER_ERRORS:
        return None
    return lambda weights: types.quantize(name, weights), lambda data: types.dequantize(name, data, data.shape[1] // size * block)


def _by_gguf(gguf: Any, name: str, kind: Any) -> Functions:
    def quantize(weights: Floats) -> Bytes:
        try:
            data = gguf.quants.quantize(weights, kind)
        except NotImplementedError as error:
            raise UserError(f"quantising to {name} needs the built llama.cpp: run `mbq-gguf build` first") from error
        return np.ascontiguousarray(data).view(np.uint8)

    def dequantize(data: Bytes) -> Floats:
        if name == "F32":
            return np.ascontiguousarray(data).view(np.float32)
        if name == "F16":
            return np.ascontiguousarray(data).view(np.float16).astype(np.float32)
        return np.asarray(gguf.quants.dequantize(data, kind), np.float32)

    return quantize, dequantize
