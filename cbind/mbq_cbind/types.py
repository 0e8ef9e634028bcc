"""ggml's own quantisers and dequantisers, and the CPU's dot product of a block type."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mbq_cbind.errors import BindingError, CallError
from mbq_cbind.library import load

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ROWS_AT_ONCE = 64  # rows that one thread quantises before it takes more


class TypeInfo(NamedTuple):
    """ggml's information about a type: its name ("q4_0"), weights per block, bytes per block, and whether it is quantised."""

    name: str
    block_size: int
    type_size: int
    is_quantized: bool


@cache
def _type_ids() -> dict[str, int]:
    binding = load()
    names = ((binding.text(binding.c.ggml_type_name(i)), i) for i in range(binding.c.GGML_TYPE_COUNT))
    # Ids of removed types still carry a name in some versions, but no block size.
    return {name.casefold(): i for name, i in names if name and binding.c.ggml_get_type_traits(i).blck_size > 0}


def type_names() -> list[str]:
    """The names of all types that the built ggml knows, in ggml's spelling."""
    return [type_info(i).name for i in _type_ids().values()]


def type_id(kind: str | int) -> int:
    """The ggml_type for a name, case-insensitive, or an id. Raises CallError if the built ggml does not know it."""
    ids = _type_ids()
    if isinstance(kind, str) and kind.casefold() in ids:
        return ids[kind.casefold()]
    if not isinstance(kind, str) and kind in ids.values():
        return int(kind)
    raise CallError(f"ggml has no type {kind!r}: choose one of {', '.join(sorted(ids))}")


def type_info(kind: str | int) -> TypeInfo:
    """The information about a type from ggml's type traits."""
    binding = load()
    traits = binding.c.ggml_get_type_traits(type_id(kind))
    return TypeInfo(binding.text(traits.type_name), traits.blck_size, traits.type_size, bool(traits.is_quantized))


def row_bytes(kind: str | int, columns: int) -> int:
    """Bytes of a row of ``columns`` weights. Raises CallError if the row is not a whole number of blocks."""
    info = type_info(kind)
    if columns <= 0 or columns % info.block_size:
        raise CallError(f"{info.name} keeps {info.block_size} weights per block and rows of {columns} do not fit: choose another type")
    return columns // info.block_size * info.type_size


def quantize(kind: str | int, weights: Floats, imatrix: Floats | None = None) -> Bytes:
    """Quantise weights [rows, columns] to blocks [rows, row_bytes] with ``ggml_quantize_chunk``, like llama-quantize.

    ``imatrix`` [columns] is the importance of each input channel (mean squared activation). Rows are shared out to all cores; the bytes do
    not depend on how. Raises CallError if rows do not fit the type, BindingError if the type needs an importance matrix.
    """
    binding, number = load(), type_id(kind)
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    packed = np.empty((rows, row_bytes(kind, columns)), np.uint8)
    if imatrix is None and binding.c.ggml_quantize_requires_imatrix(number):
        raise BindingError(f"{type_info(kind).name} cannot be made without an importance matrix: give one, or choose another type")
    importance = binding.ffi.NULL
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        if imatrix.shape != (columns,):
            raise CallError(f"the importance matrix has shape {imatrix.shape}: give one number for each of {columns} columns")
        importance = binding.ffi.from_buffer("float[]", imatrix)

    def chunk(first: int) -> int:
        part, out = weights[first : first + ROWS_AT_ONCE], packed[first : first + ROWS_AT_ONCE]
        return int(binding.c.ggml_quantize_chunk(number, _floats(part), _bytes(out), 0, len(part), columns, importance))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = sum(pool.map(chunk, range(0, rows, ROWS_AT_ONCE)))
    if written != packed.size:
        raise BindingError(f"ggml wrote {written} bytes where {packed.size} were expected: run `mbq-gguf build` again")
    return packed


def dequantize(kind: str | int, data: Bytes, columns: int) -> Floats:
    """Dequantise blocks [rows, row_bytes] to weights [rows, columns] with the type's ``to_float``."""
    binding, info = load(), type_info(kind)
    data = _checked_rows(kind, data, columns)
    weights = np.empty((len(data), columns), np.float32)
    if info.name == "f32":
        return data.view(np.float32).reshape(weights.shape).copy()
    to_float = binding.c.ggml_get_type_traits(type_id(kind)).to_float
    if to_float == binding.ffi.NULL:
        raise CallError(f"ggml does not turn {info.name} back into floats: choose a type for weights")
    to_float(_bytes(data), _floats(weights), weights.size)
    return weights


def is_valid(kind: str | int, data: Bytes) -> bool:
    """Whether ggml accepts the blocks (no NaN or infinite scale)."""
    data = np.ascontiguousarray(data, np.uint8)
    return bool(load().c.ggml_validate_row_data(type_id(kind), _bytes(data), data.size))


def activation_type(kind: str | int) -> str:
    """The type that the CPU quantises activations to for products with weights of this type ("q8_1" for MBQ3)."""
    return type_info(_cpu_traits(kind).vec_dot_type).name


def round_activations(kind: str | int, x: Floats) -> Bytes:
    """Activations [n, columns] in the CPU's activation type for weights of ``kind``: bytes [n, row_bytes of that type]."""
    rounded = activation_type(kind)
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((len(x), row_bytes(rounded, x.shape[1])), np.uint8)
    if rounded == "f32":
        return x.view(np.uint8)
    _cpu_traits(rounded).from_float(_floats(x), _bytes(out), x.size)
    return out


def vec_dot(kind: str | int, data: Bytes, columns: int, x: Floats) -> Floats:
    """The CPU's dot products: blocks [rows, row_bytes] with activations ``x`` [columns], float32 [rows].

    This is the kernel that a mul_mat runs on this machine's instruction set, on one row at a time.
    """
    data, kernel = _checked_rows(kind, data, columns), _cpu_traits(kind).vec_dot
    rounded = round_activations(kind, x[None])
    result = np.empty(len(data), np.float32)
    for row, out in zip(data, result[:, None], strict=True):
        kernel(columns, _floats(out), 0, _bytes(row), 0, _bytes(rounded), 0, 1)
    return result


def _cpu_traits(kind: str | int) -> Any:
    return load().c.ggml_get_type_traits_cpu(type_id(kind))


def _checked_rows(kind: str | int, data: Bytes, columns: int) -> Bytes:
    data = np.ascontiguousarray(data, np.uint8)
    size = row_bytes(kind, columns)
    if data.ndim != 2 or data.shape[1] != size:
        raise CallError(
            f"rows of {columns} weights in {type_info(kind).name} are {size} bytes and the data is {data.shape}: give it as rows"
        )
    return data


def _floats(array: Floats) -> Any:
    return load().ffi.from_buffer("float[]", array)


def _bytes(array: Bytes) -> Any:
    return load().ffi.from_buffer("uint8_t[]", array)
