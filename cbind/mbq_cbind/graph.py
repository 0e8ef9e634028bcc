"""Runs one operation of a model's graph on one named backend device."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import numpy as np

from mbq_cbind.errors import BindingError, CallError
from mbq_cbind.library import load_whole
from mbq_cbind.types import Floats

TENSORS = 8  # room for an operation's inputs, their views and its result


def devices() -> list[str]:
    """The names of the backend devices of the build on this machine, for example ["CUDA0", "CPU"]."""
    binding = load_whole()
    count = binding.c.ggml_backend_dev_count()
    return [binding.text(binding.c.ggml_backend_dev_name(binding.c.ggml_backend_dev_get(i))) for i in range(count)]


def open_graph(device: str, threads: int | None, reference: bool, stack: ExitStack) -> tuple[Any, Any, Any]:
    """Open a backend; returns ggml's functions, the backend, and a context with room for a graph but not for data."""
    binding = load_whole()
    ffi, c = binding.ffi, binding.c
    backend = _backend(device, threads, stack)
    if reference:
        c.ggml_backend_cpu_set_use_ref(backend, True)
    memory = TENSORS * c.ggml_tensor_overhead() + c.ggml_graph_overhead()
    context = c.ggml_init({"mem_size": memory, "mem_buffer": ffi.NULL, "no_alloc": True})
    _present(context, "no memory for a graph", stack, c.ggml_free)
    return c, backend, context


def compute(product: Any, inputs: list[tuple[Any, Any]], kind: str, device: str, backend: Any, context: Any, stack: ExitStack) -> Floats:
    """Compute ``product`` with ``inputs`` (tensors and their arrays); ``kind`` is the type to name if the device does not support it."""
    binding = load_whole()
    ffi, c = binding.ffi, binding.c
    if not c.ggml_backend_supports_op(backend, product):
        raise BindingError(f"{device} has no kernel for {kind}: choose another device or type")
    _present(c.ggml_backend_alloc_ctx_tensors(context, backend), f"{device} has too little memory", stack, c.ggml_backend_buffer_free)
    for tensor, array in inputs:
        c.ggml_backend_tensor_set(tensor, ffi.from_buffer(array), 0, array.nbytes)
    graph = c.ggml_new_graph(context)
    c.ggml_build_forward_expand(graph, product)
    if c.ggml_backend_graph_compute(backend, graph) != c.GGML_STATUS_SUCCESS:
        raise BindingError(f"the operation failed on {device}: try fewer rows or another device")
    result = np.empty(np.prod(list(product.ne)), np.float32)
    c.ggml_backend_tensor_get(product, ffi.from_buffer(result), 0, result.nbytes)
    return result


def _backend(device: str, threads: int | None, stack: ExitStack) -> Any:
    binding = load_whole()
    ffi, c = binding.ffi, binding.c
    handle = c.ggml_backend_dev_by_name(device.encode())
    if handle == ffi.NULL:
        raise CallError(f"there is no device {device}: choose one of {', '.join(devices())}")
    backend = c.ggml_backend_dev_init(handle, ffi.NULL)
    _present(backend, f"{device} could not be started", stack, c.ggml_backend_free)
    setter = c.ggml_backend_reg_get_proc_address(c.ggml_backend_dev_backend_reg(handle), b"ggml_backend_set_n_threads")
    if setter != ffi.NULL:
        ffi.cast("void (*)(ggml_backend_t, int)", setter)(backend, threads or os.cpu_count() or 1)
    return backend


def _present(pointer: Any, complaint: str, stack: ExitStack, free: Any) -> None:
    if pointer == load_whole().ffi.NULL:
        raise BindingError(f"{complaint}: free some memory and try again")
    stack.callback(free, pointer)
