"""Flash attention on one named backend device, as a model's graph would run it."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from mbq_cbind.errors import CallError
from mbq_cbind.graph import compute, open_graph
from mbq_cbind.types import Floats

TYPES = {"F16": np.float16, "F32": np.float32}


def flash_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats,
    *,
    kind: str = "F16",
    softcap: float = 0.0,
    bias: float = 0.0,
    sinks: Floats | None = None,
    device: str = "CPU",
    threads: int | None = None,
    reference: bool = False,
) -> Floats:
    """softmax(q k^T / sqrt(width) + mask) v: float32 [streams, rows, heads, width of v].

    Queries [streams, heads, rows, width], keys and values [streams, key heads, cells, width] of type ``kind``, ``mask`` [streams, rows,
    cells] of 0 and -inf. ``softcap``, ``bias`` (ALiBi's largest) and ``sinks`` [heads] as in ggml_flash_attn_ext; ``threads`` and
    ``reference`` apply only to the CPU. Raises CallError for inconsistent shapes, BindingError if the device fails.
    """
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or mask.shape != (*q.shape[::2], k.shape[2]):
        raise CallError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape} and mask {mask.shape} do not belong together: see the docstring"
        )
    with ExitStack() as stack:
        c, backend, context = open_graph(device, threads, reference, stack)
        stored = c.GGML_TYPE_F16 if kind == "F16" else c.GGML_TYPE_F32
        arrays = [np.ascontiguousarray(q, np.float32), *(np.ascontiguousarray(x, TYPES[kind]) for x in (k, v))]
        arrays.append(np.ascontiguousarray(mask[:, None], np.float16))
        types = (c.GGML_TYPE_F32, stored, stored, c.GGML_TYPE_F16)
        tensors = [c.ggml_new_tensor_4d(context, t, *array.shape[::-1]) for t, array in zip(types, arrays, strict=True)]
        result = c.ggml_flash_attn_ext(context, *tensors, q.shape[3] ** -0.5, bias, softcap)
        if sinks is not None:
            arrays.append(np.ascontiguousarray(sinks, np.float32))
            tensors.append(c.ggml_new_tensor_4d(context, c.GGML_TYPE_F32, len(sinks), 1, 1, 1))
            result.src[4] = tensors[-1]
        inputs = list(zip(tensors, arrays, strict=True))
        found = compute(result, inputs, f"attention with keys of {kind}", device, backend, context, stack)
        return found.reshape(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
