"""A GGUF file as parts that can be changed one by one and written again, valid or not.

Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. Values stay as the bytes that encode them: what is not
touched is written as it was.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES

STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a scalar by GGUF's value type
ALIGNMENT = 32
LARGEST = 1 << 20  # bytes of a tensor that are written, whatever its shape says
BLOCKS = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()} | {120: (128, 52), 121: (64, 28), 122: (128, 52), 123: (64, 28)}


class Key(NamedTuple):
    """One entry of the metadata."""

    name: bytes
    kind: int
    payload: bytes


class Tensor(NamedTuple):
    """One entry of the table of tensors; ``size`` is where its data really end, which no file says."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int
    dimensions: int | None = None  # what the file says, where it lies


@dataclass
class Document:
    """A whole file."""

    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None  # what the file says, where it lies
    tensor_count: int | None = None

    def write(self) -> bytes:
        """The file."""
        parts = [
            self.magic,
            struct.pack("<I", self.version & 0xFFFFFFFF),
            u64(len(self.tensors) if self.tensor_count is None else self.tensor_count),
            u64(len(self.keys) if self.key_count is None else self.key_count),
        ]
        for key in self.keys:
            parts += [string(key.name), u32(key.kind), key.payload]
        for tensor in self.tensors:
            dimensions = len(tensor.dims) if tensor.dimensions is None else tensor.dimensions
            parts += [string(tensor.name), u32(dimensions), *(u64(n) for n in tensor.dims), u32(tensor.kind), u64(tensor.offset)]
        head = b"".join(parts)
        return head + bytes(-len(head) % ALIGNMENT) + self.data

    def pack(self) -> None:
        """Every tensor has the bytes that its type and shape ask for, one after another, as readers want it: what was there, then zeros."""
        data, tensors = [], []
        at = 0
        for tensor in self.tensors:
            size = min(tensor_bytes(tensor), LARGEST)
            content = self.data[tensor.offset : tensor.offset + size].ljust(size + -size % ALIGNMENT, b"\0")
            tensors.append(tensor._replace(offset=at))
            data.append(content)
            at += len(content)
        self.tensors, self.data = tensors, b"".join(data)

    def find(self, name: bytes) -> int | None:
        """Where the key ``name`` stands."""
        return next((index for index, key in enumerate(self.keys) if key.name == name), None)

    def put(self, key: Key) -> None:
        """``key`` in the place of one of its name, or last."""
        index = self.find(key.name)
        if index is None:
            self.keys.append(key)
        else:
            self.keys[index] = key


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's data; of a type that nobody knows, as many as it has elements."""
    block, size = BLOCKS.get(tensor.kind, (1, 1))
    return -(-prod(tensor.dims) // block) * size


def copy_of(data: bytes) -> Document:
    """The parts of the file ``data``, to be changed; the parts themselves are read once."""
    whole = _parse(data)
    return replace(whole, keys=list(whole.keys), tensors=list(whole.tensors))


@lru_cache(maxsize=64)
def _parse(data: bytes) -> Document:
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    at = 24
    keys, tensors = [], []
    for _ in range(key_count):
        name, at = _string(data, at)
        kind = struct.unpack_from("<I", data, at)[0]
        end = _end(data, at + 4, kind)
        keys.append(Key(name, kind, data[at + 4 : end]))
        at = end
    for _ in range(tensor_count):
        name, at = _string(data, at)
        dimensions = struct.unpack_from("<I", data, at)[0]
        dims = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        at += 4 + 8 * dimensions
        kind, offset = struct.unpack_from("<IQ", data, at)
        tensors.append(Tensor(name, dims, kind, offset))
        at += 12
    return Document(keys, tensors, data[-(-at // ALIGNMENT) * ALIGNMENT :], version=version)


def _end(data: bytes, at: int, kind: int) -> int:
    """Where the value of type ``kind`` that begins at ``at`` ends."""
    if kind == STRING:
        return _string(data, at)[1]
    if kind != ARRAY:
        return at + WIDTHS[kind]
    kind, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in WIDTHS:
        return at + WIDTHS[kind] * int(length)
    for _ in range(length):
        at = _end(data, at, kind)
    return at


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    end = at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    return data[at + 8 : end], end


def string(text: bytes) -> bytes:
    """A length and that many bytes."""
    return u64(len(text)) + text


def strings(texts: list[bytes]) -> bytes:
    """The value of an array of strings."""
    return u32(STRING) + u64(len(texts)) + b"".join(string(text) for text in texts)


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)
