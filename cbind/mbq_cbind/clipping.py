"""Counts activations beyond a file's static ranges (``mbq.act.*``) while a model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mbq_cbind.library import Binding
from mbq_cbind.mul_mat import ROW_SCALE

CLASSES = ("dynamic", "text", "vision")  # in the order of their numbers in llama.cpp's graph (llama-mbq-act.cpp)
RANGES, RANGES_OUT = "mbq_act_ranges", "mbq_act_ranges_out"  # for all rows, and for those after the last attention


class Clipping:
    """The counters; :class:`mbq_cbind.model.Model` asks for every node of its graph whether it is wanted, and passes those that are.

    An activation that several matrices read is counted once. Only rows with a static range are counted, so none in micro-batches of at most
    64 rows.
    """

    def __init__(self) -> None:
        self._values = np.zeros(len(CLASSES), np.int64)
        self._beyond = np.zeros(len(CLASSES), np.int64)
        self._classes: dict[int, npt.NDArray[np.int32]] = {}  # classes of the rows of this micro-batch, by their number
        self._all = np.zeros(0, np.int32)
        self._last: Any = None  # the activation that was counted last

    def shares(self) -> dict[str, float]:
        """The share of values beyond their range since the last call, for each class with values; resets the counters."""
        found = {name: float(b / n) for name, n, b in zip(CLASSES, self._values, self._beyond, strict=True) if n}
        self._values[:] = self._beyond[:] = 0
        return found

    def wants(self, binding: Binding, tensor: Any) -> bool:
        """Whether the node is relevant: the rows' classes, or the product of an activation with ranges."""
        null = binding.ffi.NULL
        if tensor.op == binding.c.GGML_OP_GET_ROWS:
            return binding.text(tensor.name) in (RANGES, RANGES_OUT)
        product = tensor.op == binding.c.GGML_OP_MUL_MAT and tensor.src[2] != null and tensor.src[0].flags & ROW_SCALE
        return bool(product) and tensor.src[1] != self._last

    def take(self, binding: Binding, tensor: Any) -> None:
        """Process a computed node."""
        if tensor.op == binding.c.GGML_OP_GET_ROWS:
            self._last = None
            rows = _read(binding, tensor.src[1], np.dtype(np.int32))[0]
            if binding.text(tensor.name) == RANGES:
                self._all, self._classes = rows, {len(rows): rows}
            elif len(rows) not in self._classes:
                self._classes[len(rows)] = self._all[rows]
            return
        self._last = tensor.src[1]
        x, ranges = (_read(binding, tensor.src[i], np.dtype(np.float32)) for i in (1, 2))
        static = ranges[:, 0] > 0
        beyond = np.count_nonzero(np.abs(x) > ranges, axis=1)
        kinds = self._classes[len(x)][static]
        self._values += x.shape[1] * np.bincount(kinds, minlength=len(CLASSES))
        self._beyond += np.bincount(kinds, beyond[static], minlength=len(CLASSES)).astype(np.int64)


def _read(binding: Binding, tensor: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Read a matrix [rows, columns] of 4-byte values, whose rows may be strided."""
    rows, columns, stride = tensor.ne[1], tensor.ne[0], tensor.nb[1]
    data = np.zeros(((rows - 1) * stride + columns * 4) // 4, dtype)
    binding.c.ggml_backend_tensor_get(tensor, binding.ffi.from_buffer(data), 0, data.nbytes)
    return np.lib.stride_tricks.as_strided(data, (rows, columns), (stride, 4))
