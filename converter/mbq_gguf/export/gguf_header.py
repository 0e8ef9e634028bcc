"""Reads the header of a GGUF file: metadata and the table of tensors, without touching the weights.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, and 2, which does not differ in
the parts that are read here). gguf's own reader takes seconds for the vocabulary of a large model and fails on damaged files with arbitrary
exceptions; this one checks every length against the file size.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.formats.gguf_types import import_gguf

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NESTING = 4  # nested arrays: allowed by the format, but not used by any known file
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str
Value = Scalar | list["Value"]


@dataclass(frozen=True)
class TensorEntry:
    """One entry of the table of tensors. ``shape`` is in ggml's order: the row length first."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    offset: int  # from the start of the data

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Metadata by key, and the tensors in file order. Long arrays are truncated (see :func:`read_header`)."""

    version: int
    metadata: dict[str, Value]
    lengths: dict[str, int]  # full length of every array
    tensors: list[TensorEntry]
    data_start: int  # offset of the tensors' data in the file


class _Damaged(Exception):
    """Says what is wrong with the file."""


def read_header(path: Path, *, longest_array: int = 1024) -> Header:
    """Read the header of the GGUF file ``path``; arrays are truncated to ``longest_array`` elements.

    Raises UserError if the file cannot be read, is not a GGUF file, is damaged, or is shorter than its table of tensors says.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"{path} is not a GGUF file: give one that begins with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, longest_array).header()
    except OSError as error:
        raise UserError(f"cannot read {path} ({(error.strerror or str(error)).lower()}): check the path") from error
    except _Damaged as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): download or convert it again") from error


class _Reader:
    """A cursor over the mapped file."""

    def __init__(self, data: mmap.mmap, longest_array: int) -> None:
        self.data = data
        self.size = len(data)
        self.at = 4  # after the magic
        self.longest_array = longest_array
        self.gguf = import_gguf()
        self.lengths: dict[str, int] = {}

    def header(self) -> Header:
        """The whole header."""
        version = self.integer(4)
        if version not in (2, 3):
            raise _Damaged(f"GGUF version {version} is unknown")
        tensor_count, key_count = self.integer(8), self.integer(8)
        # A key takes at least 12 bytes and a tensor 24: reject impossible counts before looping.
        if key_count * 12 + tensor_count * 24 > self.size:
            raise _Damaged("it has more entries than fit in it")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(self.integer(4), key)
        tensors = [self.tensor() for _ in range(tensor_count)]
        return Header(version, metadata, self.lengths, tensors, self.data_start(metadata.get("general.alignment", 32), tensors))

    def take(self, count: int) -> int:
        """Advance by ``count`` bytes and return their start."""
        start = self.at
        if count > self.size - start:
            raise _Damaged("it ends in the middle of its header")
        self.at = start + count
        return start

    def scalar(self, code: str) -> int | float | bool:
        """One number of struct's type ``code``."""
        value: int | float | bool = struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]
        return value

    def integer(self, width: int) -> int:
        """One unsigned integer of ``width`` bytes."""
        start = self.take(width)
        return int.from_bytes(self.data[start : start + width], "little")

    def string(self) -> str:
        """A string: an 8-byte length and that many bytes of UTF-8."""
        length = self.integer(8)
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, key: str, depth: int = 0) -> Value:
        """One metadata value of GGUF's value type ``kind``."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth == MAX_NESTING:
            raise _Damaged(f"the value of {key!r} has the unknown type {kind}")
        kind, length = self.integer(4), self.integer(8)
        self.lengths[key] = length
        if kind in SCALARS:
            width = struct.calcsize("<" + SCALARS[kind])
            start, kept = self.take(length * width), min(length, self.longest_array)
            return list(struct.unpack_from(f"<{kept}{SCALARS[kind]}", self.data, start))
        kept_values: list[Value] = []
        for index in range(length):  # terminates at the end of the file: each element takes at least 8 bytes
            element = self.value(kind, key, depth + 1)
            if index < self.longest_array:
                kept_values.append(element)
        return kept_values

    def tensor(self) -> TensorEntry:
        """One entry of the table of tensors."""
        name = self.string()
        dimensions = self.integer(4)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.integer(8) for _ in range(dimensions))
        if 0 in shape:
            raise _Damaged(f"tensor {name!r} is empty")
        type_id, offset = self.integer(4), self.integer(8)
        try:
            kind = self.gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise _Damaged(f"tensor {name!r} has the type {type_id}, which is unknown") from None
        block_size, type_size = self.gguf.GGML_QUANT_SIZES[kind]
        if shape[0] % block_size:
            raise _Damaged(f"the rows of tensor {name!r} are not a multiple of {kind.name}'s block of {block_size}")
        return TensorEntry(name, shape, kind.name, prod(shape) // block_size * type_size, offset)

    def data_start(self, alignment: Value, tensors: list[TensorEntry]) -> int:
        """The offset of the data; checks that every tensor lies within the file."""
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Damaged(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        for tensor in tensors:
            if start + tensor.offset + tensor.nbytes > self.size:
                raise _Damaged(f"its {self.size} bytes end before tensor {tensor.name!r} does")
        return start
