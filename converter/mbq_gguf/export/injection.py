"""Makes llama.cpp's conversion package write our quantised tensors in place of its own.

The package converts a checkpoint with three methods of one model object: ``modify_tensors`` maps a checkpoint's tensor to tensors of the
file, possibly with permuted rows; ``tensor_force_quant`` chooses their types; and the writer's ``add_tensor`` receives the bytes. We wrap
each of them, on this object only. If an architecture permutes or splits rows, the quantised rows are permuted or split in the same way,
because the original methods still run. This needs no list of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from mbq_gguf.errors import UserError
from mbq_gguf.export.row_order import Order, row_order
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.quant_type import Bytes, QuantType
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type, quant_type_for
from mbq_gguf.formats.row_scale import QUANT_TYPES, stored_as

CHUNK_WEIGHTS = 1 << 24  # weights of an embedding to quantise at a time: 64 MB in float32
# An expert's decoder key: layer, expert index and matrix.
EXPERT = re.compile(r"layers\.(\d+)\.(?:(?:mlp|feed_forward)\.)?experts\.(\d+)\.(gate|up|down)_proj\.weight")
MERGED = "_gate_up_"  # in the name of a tensor with each expert's gate followed by its up
Stacks = dict[str, list[tuple[QuantisedTensor, ...]]]
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a written file. ``shape`` is numpy's order, [out, in]."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    nbytes: int
    wanted: str | None = None  # the requested type, if the row length ruled it out

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


class Deferred:
    """A tensor that is computed when it is written; gguf's writer only needs an array's size and ``tofile``."""

    def __init__(self, chunks: Callable[[], Iterable[npt.NDArray[Any]]], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.chunks = chunks
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = prod(shape) * self.dtype.itemsize
        self.advance: Callable[[int], None] = lambda _: None

    def tofile(self, file: BinaryIO) -> None:
        """Write all bytes. Unlike ndarray.tofile this preserves errno, so that a full disk can be recognised."""
        for chunk in self.chunks():
            file.write(np.ascontiguousarray(chunk).view(np.uint8).reshape(-1).data)
            self.advance(chunk.nbytes)


class Injection:
    """The wrappers for one model object. After ``prepare_tensors`` has run, ``records`` lists its tensors and ``row_scales`` the names of
    those with one scale per row.

    ``experts`` are quantised weights by decoder key. Checkpoints store them separately or stacked, possibly transposed, while the file
    always has [experts, rows, columns] with unpermuted rows. They are therefore matched by the file's names, without ``modify_tensors``.
    """

    def __init__(
        self,
        model: Any,
        quantised: Mapping[str, QuantisedTensor],
        replaced: Mapping[str, torch.Tensor],
        embedding_type: str | None,
        experts: Mapping[str, QuantisedTensor] | None = None,
    ) -> None:
        self.records: list[TensorRecord] = []
        self.row_scales: list[str] = []
        self._gguf = import_gguf()
        self._embedding_type = embedding_type
        self._quantised = quantised
        self._stacks = stacks(experts or {})
        self._pending = {*quantised, *(name for name in self._stacks if MERGED not in name)}
        self._rows: dict[str, tuple[QuantisedTensor, Order]] = {}
        self._sources: dict[str, Any] = {}  # embeddings, lazy, in the checkpoint's type
        self._modify, self._force, self._add = model.modify_tensors, model.tensor_force_quant, model.gguf_writer.add_tensor
        self._writer = model.gguf_writer
        for name, tensor in replaced.items():
            _replace(model, name, tensor)
        model.modify_tensors, model.tensor_force_quant = self._modify_tensors, self._tensor_force_quant
        model.gguf_writer.add_tensor = self._add_tensor

    def check_used(self) -> None:
        """Raise UserError if a quantised tensor is not in the file."""
        if self._pending:
            raise UserError(f"llama.cpp's conversion leaves out {min(self._pending)}: this model needs an adapter of its own")

    def report_to(self, advance: Callable[[int], None]) -> None:
        """Call ``advance(bytes)`` after each chunk that is written."""
        for tensors in self._writer.tensors:
            for info in tensors.values():
                info.tensor.advance = advance

    def _modify_tensors(self, data: Any, name: str, bid: int | None) -> list[tuple[str, Any]]:
        outputs = list(self._modify(data, name, bid))
        self._sources |= {output: tensor for output, tensor in outputs if output in EMBEDDINGS}
        quantised = self._quantised.get(name)
        if quantised is not None:
            shape = (quantised.data.shape[0], quantised.columns)
            if tuple(data.shape) != shape:
                raise UserError(f"{name} is {tuple(data.shape)} in the checkpoint and {shape} by its config.json: download the model again")
            block = quant_type(stored_as(quantised.type_name)).block_size
            for output, order in row_order(lambda probe: self._modify(probe, name, bid), shape, name, block).items():
                self._rows[output] = (quantised, order)
            self._pending.discard(name)
        return outputs

    def _tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
        if new_name in self._rows or new_name in self._stacks:
            return self._gguf.GGMLQuantizationType.F16  # never computed: _add_tensor provides the bytes
        if self._embedding_type is not None and new_name in EMBEDDINGS:
            return self._gguf.GGMLQuantizationType.F32
        return self._force(name, new_name, bid, n_dims)

    def _add_tensor(self, name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None) -> None:
        shape = tuple(tensor.shape)
        wanted: str | None = None
        if name in self._rows:
            quantised, order = self._rows[name]
            chosen = quant_type(quantised.type_name)
            deferred = Deferred(lambda: [order.of(quantised.data)], (len(order.rows), quantised.data.shape[1]), np.uint8)
            raw_dtype = self._gguf.GGMLQuantizationType[stored_as(chosen.name)]
            if chosen.name in QUANT_TYPES:
                self.row_scales.append(name)
        elif name in self._stacks:
            parts = self._stacks[name]
            chosen, rows, columns = quant_type(parts[0][0].type_name), sum(len(part.data) for part in parts[0]), parts[0][0].columns
            if shape != (len(parts), rows, columns):
                raise UserError(f"{name} is {shape} in the checkpoint, which are not the experts that were quantised: run again")
            deferred = Deferred(
                lambda: (part.data for expert in parts for part in expert), (*shape[:2], parts[0][0].data.shape[1]), np.uint8
            )
            # not in row_scales: products of experts do not support them
            raw_dtype = self._gguf.GGMLQuantizationType[stored_as(chosen.name)]
            self._pending -= {name, name.replace(MERGED, "_gate_"), name.replace(MERGED, "_up_")}
        elif self._embedding_type is not None and name in EMBEDDINGS:
            chosen = quant_type_for(self._embedding_type, shape[-1])
            wanted = self._embedding_type if chosen.name != self._embedding_type else None
            deferred = Deferred(lambda: in_chunks(self._sources[name], chosen), (*shape[:-1], chosen.row_bytes(shape[-1])), np.uint8)
            raw_dtype = self._gguf.GGMLQuantizationType[chosen.name]
        else:
            deferred = Deferred(lambda: [eager(tensor)], shape, tensor.dtype)
        self._add(name, deferred, raw_shape=raw_shape, raw_dtype=raw_dtype)
        info = self._writer.tensors[-1][name]
        self.records.append(TensorRecord(name, info.dtype.name, tuple(info.shape), info.nbytes, wanted))


def stacks(experts: Mapping[str, QuantisedTensor]) -> Stacks:
    """Quantised experts, in order, by the name of the stacked tensor; gate and up also as one tensor, as in some files."""
    found: dict[str, dict[int, QuantisedTensor]] = {}
    for key, tensor in experts.items():
        match = EXPERT.fullmatch(key)
        assert match is not None
        layer, number, matrix = match.groups()
        found.setdefault(f"blk.{layer}.ffn_{matrix}_exps.weight", {})[int(number)] = tensor
    ordered: Stacks = {name: [(parts[number],) for number in range(len(parts))] for name, parts in found.items()}
    gates = [name for name in ordered if "_gate_" in name]
    pairs = {name: zip(ordered[name], ordered[name.replace("_gate_", "_up_")], strict=True) for name in gates}
    return {**ordered, **{name.replace("_gate_", MERGED): [(*gate, *up) for gate, up in both] for name, both in pairs.items()}}


def _replace(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Replace the checkpoint's tensor ``name`` in ``model`` by ``tensor``."""
    shape = tuple(model.model_tensors[name]().shape)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} is {shape} in the checkpoint and {tuple(tensor.shape)} after folding: leave the model alone and run again")
    model.model_tensors[name] = lambda: tensor.detach().cpu()


def in_chunks(tensor: Any, chosen: QuantType) -> Iterable[Bytes]:
    """Quantise a lazy torch ``tensor`` [rows, columns] to the type ``chosen`` in chunks of rows, in parallel on torch's number of
    threads."""
    values, threads = eager(tensor), torch.get_num_threads()
    step = max(1, CHUNK_WEIGHTS // values.shape[-1])
    starts = range(0, values.shape[0], step)

    def coded(start: int) -> Bytes:
        return chosen.quantize(values[start : start + step].float().contiguous().numpy())

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(starts), threads):
            yield from pool.map(coded, starts[first : first + threads])


def eager(tensor: Any) -> Any:
    """Evaluate a lazy tensor; anything else is returned as it is."""
    to_eager = getattr(type(tensor), "to_eager", None)
    return tensor if to_eager is None else to_eager(tensor)
