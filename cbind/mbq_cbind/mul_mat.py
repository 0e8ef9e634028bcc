"""One matrix product on one named backend device, as a model's graph would run it."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from mbq_cbind.errors import CallError
from mbq_cbind.graph import compute, open_graph
from mbq_cbind.types import Bytes, Floats, row_bytes, type_id, type_info

ROW_SCALE = 1 << 16  # GGML_TENSOR_FLAG_ROW_SCALE in ggml-row-scale.h


def mul_mat(
    kind: str | int,
    data: Bytes,
    columns: int,
    x: Floats,
    *,
    device: str = "CPU",
    threads: int | None = None,
    row_scale: bool = False,
    ranges: Floats | float | None = None,
    reference: bool = False,
    spacing: int = 0,
) -> Floats:
    """Weights, blocks [..., rows, row_bytes] of type ``kind``, times activations ``x`` [..., n, columns]: float32 [..., n, rows].

    Both may have up to two more dimensions; those of ``x`` are multiples of the weights', which are broadcast. ``threads`` (None: all
    cores) and ``reference``, the plain path, apply only to the CPU. ``row_scale`` flags the weights as having one scale per row; such a
    product accepts static ``ranges`` [n], one per row of ``x`` with 0 for none, or one number other than 0 for all rows. ``spacing`` is the
    number of floats between the rows of ``x``. Raises CallError for invalid shapes or devices, BindingError if the device does not support
    the type or has no memory.
    """
    x = np.ascontiguousarray(x, np.float32)
    data = np.ascontiguousarray(data, np.uint8)
    if not (2 <= x.ndim <= 4 and 2 <= data.ndim <= 4) or x.shape[-1] != columns or data.shape[-1] != row_bytes(kind, columns):
        raise CallError(
            f"weights {data.shape} of {type_info(kind).name} and activations {x.shape} do not belong to {columns} columns: give arrays "
            f"[rows, {row_bytes(kind, columns)}] and [n, {columns}]"
        )
    outer, weights_outer = _outer(x), _outer(data)
    if any(many % few for many, few in zip(outer, weights_outer, strict=True)):
        raise CallError(f"weights {data.shape} cannot be repeated over activations {x.shape}: give multiples of their outer dimensions")
    spaced = np.zeros((*x.shape[:-1], columns + spacing), np.float32)
    spaced[..., :columns] = x
    with ExitStack() as stack:
        c, backend, context = open_graph(device, threads, reference, stack)
        weight = c.ggml_new_tensor_4d(context, type_id(kind), columns, data.shape[-2], *weights_outer)
        if row_scale:
            weight.flags |= ROW_SCALE
        rows = c.ggml_new_tensor_4d(context, c.GGML_TYPE_F32, columns + spacing, x.shape[-2], *outer)
        activations = c.ggml_view_4d(context, rows, columns, x.shape[-2], *outer, rows.nb[1], rows.nb[2], rows.nb[3], 0)
        product = c.ggml_mul_mat(context, weight, activations)
        inputs = [(weight, data), (rows, spaced)]
        if ranges is not None:  # a column of a table, as a language model's graph has them, or a single value of it, as a tower's
            single = isinstance(ranges, float)
            table = np.zeros((1 if single else x.shape[-2], 3), np.float32)
            table[:, 1] = ranges
            base = c.ggml_new_tensor_4d(context, c.GGML_TYPE_F32, 3, len(table), 1, 1)
            column = c.ggml_view_4d(context, base, 1, len(table), 1, 1, base.nb[1], base.nb[2], base.nb[3], 4)
            if single:
                column.ne[1], column.nb[1], column.nb[2], column.nb[3] = x.shape[-2], 0, 0, 0
            product.src[2] = column
            inputs.append((base, table))
        return compute(product, inputs, type_info(kind).name, device, backend, context, stack).reshape(*x.shape[:-1], data.shape[-2])


def mul_mat_id(
    kind: str | int,
    data: Bytes,
    columns: int,
    x: Floats,
    experts: npt.NDArray[np.int32],
    *,
    device: str = "CPU",
    threads: int | None = None,
) -> Floats:
    """The products of each token with its selected experts: float32 [n, used, rows].

    Weights are blocks [all, rows, row_bytes] of type ``kind``, activations ``x`` [n, 1 or used, columns], ``experts`` [n, used].
    ``threads`` and errors as in :func:`mul_mat`.
    """
    x = np.ascontiguousarray(x, np.float32)
    data = np.ascontiguousarray(data, np.uint8)
    experts = np.ascontiguousarray(experts, np.int32)
    n, used = experts.shape
    if x.shape not in {(n, 1, columns), (n, used, columns)} or data.ndim != 3 or data.shape[-1] != row_bytes(kind, columns):
        raise CallError(
            f"weights {data.shape} of {type_info(kind).name}, activations {x.shape} and experts {experts.shape} do not belong to {columns} "
            f"columns: give arrays [all, rows, {row_bytes(kind, columns)}], [n, used, {columns}] and [n, used]"
        )
    if experts.size and not (experts.min() >= 0 and experts.max() < len(data)):
        raise CallError(f"experts {experts.min()} to {experts.max()} are chosen: there are {len(data)}, counted from 0")
    with ExitStack() as stack:
        c, backend, context = open_graph(device, threads, False, stack)
        weight = c.ggml_new_tensor_4d(context, type_id(kind), columns, data.shape[1], data.shape[0], 1)
        activations = c.ggml_new_tensor_4d(context, c.GGML_TYPE_F32, columns, x.shape[1], n, 1)
        chosen = c.ggml_new_tensor_4d(context, c.GGML_TYPE_I32, used, n, 1, 1)
        product = c.ggml_mul_mat_id(context, weight, activations, chosen)
        inputs = [(weight, data), (activations, x), (chosen, experts)]
        return compute(product, inputs, type_info(kind).name, device, backend, context, stack).reshape(n, used, data.shape[1])


def _outer(array: Floats | Bytes) -> tuple[int, int]:
    """ggml's dimensions 2 and 3 of an array of two to four dimensions."""
    third, second = (1, 1, *array.shape[:-2])[-2:]
    return second, third
