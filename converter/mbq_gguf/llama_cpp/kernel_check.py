"""Runs the built CPU kernels once, in a separate process: ``python kernel_check.py <folder with libggml-cpu>``.

Multiplies every weight type in every buffer type that the CPU device offers, as llama.cpp does when it loads a model: AMX tiles and
repacked layouts exist only in those extra buffers, so products in plain memory would not use them. Weights with one scale per row have
separate kernels in plain memory; they run after each type's other products, so that the next type meets the state that they leave in AMX's
tiles. Each product is compared with numpy in float64 on the same quantised weights.

Uses only ggml's public C API. Each case is printed before it runs, so that the last line says where a fault killed the process. Exit codes:
0 all correct, 1 a product is wrong, 2 the libraries cannot be loaded.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS, ROWS = 512, 64  # multiples of AMX's requirements: 256 columns for K-quants, 32 rows for a pair of tiles
BATCHES = (1, 33)  # token generation, and a prompt that does not fill tiles evenly
MAX_RELATIVE_ERROR = 0.03  # in the 2-norm; activations rounded to 8 bits per block of 32 or 256 give 0.004 to 0.01

# Ids of ggml.h: F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K-Q6_K IQ4_NL IQ4_XS BF16, and the ids of this project from 120 on.
TYPES = (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30, *range(120, 128))
F32, I32 = 0, 26
ROW_SCALES = (2, 8)  # Q4_0 and Q8_0
ROW_SCALE = 1 << 16  # GGML_TENSOR_FLAG_ROW_SCALE of ggml-row-scale.h


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor, up to its flags."""

    _fields_ = (
        *(("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4)),
        *(("op", c_int), ("op_params", c_int * 16), ("flags", c_int)),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_new_tensor_1d": (c_void_p, (c_void_p, c_int, c_int64)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_get_rows": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (c_size_t, (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float))),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_init": (c_void_p, ()),
}

Array = NDArray[Any]


class Ggml:
    """The functions of `_SIGNATURES` from libggml-base and libggml-cpu, the CPU device and one CPU backend."""

    def __init__(self, folder: Path) -> None:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        libraries = [ctypes.CDLL(str(folder / f"lib{name}{suffix}"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        registry = self("backend_cpu_reg")
        self.device = self("backend_reg_dev_get", registry, 0)
        self.backend = self("backend_cpu_init")
        self.buffer_types = [self("backend_dev_buffer_type", self.device), *self._extra_buffer_types(registry)]

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self._functions[f"ggml_{name}"](*arguments)

    def _extra_buffer_types(self, registry: int) -> list[int]:
        address = self("backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
        found: list[int] = []
        while listed[len(found)]:  # the array ends with a null pointer
            found.append(int(listed[len(found)] or 0))
        return found

    def quantise(self, type_id: int, weights: Array) -> Array:
        """float32 [rows, columns] -> uint8 [rows, row bytes], with equal importance for all channels."""
        rows, columns = weights.shape
        data = np.zeros((rows, self("row_size", type_id, columns)), dtype=np.uint8)
        importance = np.ones(columns, dtype=np.float32)
        floats = POINTER(c_float)
        self(
            "quantize_chunk", type_id, weights.ctypes.data_as(floats), data.ctypes.data, 0, rows, columns, importance.ctypes.data_as(floats)
        )
        return data

    def product(self, operation: str, type_id: int, data: Array, other: Array, buffer_type: int, flags: int = 0) -> Array | None:
        """``mul_mat`` or ``get_rows`` of weights [ROWS, COLUMNS] held in `buffer_type`; None if that buffer type leaves the op alone."""
        weight_context, context = (self("init", InitParams(1 << 20, None, True)) for _ in range(2))
        weight = self("new_tensor_2d", weight_context, type_id, COLUMNS, ROWS)
        ctypes.cast(weight, POINTER(TensorHead)).contents.flags |= flags
        if operation == "mul_mat":
            right = self("new_tensor_2d", context, F32, COLUMNS, len(other))
        else:
            right = self("new_tensor_1d", context, I32, len(other))
        result = self(operation, context, weight, right)
        graph = self("new_graph", context)
        self("build_forward_expand", graph, result)
        buffers = [
            self("backend_alloc_ctx_tensors_from_buft", weight_context, buffer_type),
            self("backend_alloc_ctx_tensors_from_buft", context, self.buffer_types[0]),
        ]
        answer = None
        if self("backend_dev_supports_op", self.device, result):
            self("backend_tensor_set", weight, data.ctypes.data, 0, data.nbytes)
            self("backend_tensor_set", right, other.ctypes.data, 0, other.nbytes)
            answer = np.full((len(other), ROWS if operation == "mul_mat" else COLUMNS), np.nan, dtype=np.float32)
            if self("backend_graph_compute", self.backend, graph) == 0:
                self("backend_tensor_get", result, answer.ctypes.data, 0, answer.nbytes)
        for buffer in buffers:
            self("backend_buffer_free", buffer)
        for used in (weight_context, context):
            self("free", used)
        return answer


def run(ggml: Ggml) -> bool:
    """Check all types, buffer types and batch sizes; prints one line per case. Returns False at the first wrong product."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    for type_id in TYPES:
        name = ggml("type_name", type_id)
        if name in (None, b"", b"NONE"):
            continue
        data = ggml.quantise(type_id, weights)
        if not matches_numpy(ggml, name.decode(), type_id, data, ggml.buffer_types, random):
            return False
        if type_id in ROW_SCALES:
            scales = data.reshape(ROWS, COLUMNS // 32, -1)[:, :, :2]  # fp16, at the start of a block
            scales[:] = scales[:, :1]
            if not matches_numpy(ggml, f"{name.decode()} with one scale per row", type_id, data, ggml.buffer_types[:1], random, ROW_SCALE):
                return False
    return True


def matches_numpy(
    ggml: Ggml, name: str, type_id: int, data: Array, buffer_types: list[int], random: np.random.Generator, flags: int = 0
) -> bool:
    """Whether the products of one type's weights agree with numpy."""
    print(f"{name} to float", flush=True)
    exact = ggml.product("get_rows", type_id, data, np.arange(ROWS, dtype=np.int32), ggml.buffer_types[0])
    for buffer_type in buffer_types:
        for batch in BATCHES:
            activations = random.standard_normal((batch, COLUMNS), dtype=np.float32)
            case = f"{name} x {batch} in {ggml('backend_buft_name', buffer_type).decode()} memory"
            print(case, flush=True)
            answer = ggml.product("mul_mat", type_id, data, activations, buffer_type, flags)
            if answer is None:
                continue
            expected = activations.astype(np.float64) @ np.asarray(exact, dtype=np.float64).T
            error = float(np.linalg.norm(answer - expected) / np.linalg.norm(expected))
            if not error <= MAX_RELATIVE_ERROR:  # also true for NaN
                print(f"{case}: relative error {error:.3g}", flush=True)
                return False
    return True


def main(folder: str) -> int:
    """Run the kernels of the libraries in ``folder``: exit code 0 if all are right, 1 where one is not, 2 where they cannot
    be loaded."""
    try:
        ggml = Ggml(Path(folder))
    except (OSError, StopIteration) as error:
        print(f"cannot load the built libraries: {error}", flush=True)
        return 2
    return 0 if run(ggml) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
