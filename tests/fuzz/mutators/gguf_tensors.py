"""Corrupts the tensor table of a GGUF file: names, shapes, types and offsets."""

from __future__ import annotations

import random

from mutators.gguf_document import Document
from mutators.gguf_keys import TEXTS, WIDE

TYPES = (*range(45), *range(118, 126), 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def drop(document: Document, draw: random.Random) -> None:
    """A tensor is missing."""
    if document.tensors:
        del document.tensors[draw.randrange(len(document.tensors))]


def double(document: Document, draw: random.Random) -> None:
    """A tensor stands there twice."""
    if document.tensors:
        document.tensors.insert(draw.randrange(len(document.tensors) + 1), draw.choice(document.tensors))


def rename(document: Document, draw: random.Random) -> None:
    """A tensor has another's name, an odd one, or another layer's."""
    if document.tensors:
        index = draw.randrange(len(document.tensors))
        tensor, other = document.tensors[index], draw.choice(document.tensors)
        names = (*TEXTS, other.name, tensor.name + b"x" * 80, tensor.name.replace(b".0.", b".7."), tensor.name.replace(b"weight", b"bias"))
        document.tensors[index] = tensor._replace(name=draw.choice(names))


def exchange(document: Document, draw: random.Random) -> None:
    """Two tensors have each other's names."""
    if len(document.tensors) > 1:
        first, second = draw.sample(range(len(document.tensors)), 2)
        one, other = document.tensors[first], document.tensors[second]
        document.tensors[first], document.tensors[second] = one._replace(name=other.name), other._replace(name=one.name)


def reshape(document: Document, draw: random.Random) -> None:
    """A shape is turned, smaller, larger, or at an edge."""
    if document.tensors:
        index = draw.randrange(len(document.tensors))
        tensor = document.tensors[index]
        dims, place = list(tensor.dims), draw.randrange(len(tensor.dims) or 1)
        how = draw.randrange(6)
        if how == 0:
            dims.reverse()
        elif how == 1 and dims:
            dims[place] = draw.choice(WIDE)
        elif how == 2 and dims:
            dims[place] = max(1, dims[place] // 2)
        elif how == 3 and len(dims) < 4:
            dims.append(1)
        elif how == 4 and len(dims) > 1:
            dims = [dims[0] * dims[1], *dims[2:]]
        elif how == 5 and len(dims) == 1 and dims[0] % 2 == 0:
            dims = [dims[0] // 2, 2]
        document.tensors[index] = tensor._replace(dims=tuple(dims))


def miscount(document: Document, draw: random.Random) -> None:
    """A number of dimensions that the shape has not."""
    if document.tensors:
        index = draw.randrange(len(document.tensors))
        document.tensors[index] = document.tensors[index]._replace(dimensions=draw.choice((0, 1, 2, 3, 4, 5, 1 << 31)))


def retype(document: Document, draw: random.Random) -> None:
    """Another type, of the same data: often one that takes as much room or less."""
    if document.tensors:
        index = draw.randrange(len(document.tensors))
        document.tensors[index] = document.tensors[index]._replace(
            kind=draw.choice((0, 1, 2, 8, 30, 120, 121, 122, 123, draw.choice(TYPES)))
        )


def retype_all(document: Document, draw: random.Random) -> None:
    """Another type for every tensor of a kind, as a faulty converter would write it; the offsets follow where they can."""
    kinds = sorted({tensor.kind for tensor in document.tensors})
    if kinds:
        old, new = draw.choice(kinds), draw.choice(TYPES)
        document.tensors = [tensor._replace(kind=new) if tensor.kind == old else tensor for tensor in document.tensors]


def move(document: Document, draw: random.Random) -> None:
    """A tensor's data lie elsewhere: over another's, unaligned, past the end."""
    if document.tensors:
        index = draw.randrange(len(document.tensors))
        tensor, other = document.tensors[index], draw.choice(document.tensors)
        places = (other.offset, tensor.offset + draw.choice((1, 4, 16, 32)), 0, len(document.data), *WIDE)
        document.tensors[index] = tensor._replace(offset=draw.choice(places))


def counts(document: Document, draw: random.Random) -> None:
    """The file says that it holds more or less than it does."""
    if draw.random() < 0.5:
        document.tensor_count = draw.choice((*WIDE, len(document.tensors) - 1, len(document.tensors) + 1))
    else:
        document.key_count = draw.choice((*WIDE, len(document.keys) - 1, len(document.keys) + 1))


def version(document: Document, draw: random.Random) -> None:
    """Another version, another byte order, another alignment of the data."""
    document.version = draw.choice((0, 1, 2, 4, 3 << 24, (1 << 32) - 1))


EDITS = (drop, drop, double, rename, exchange, exchange, reshape, reshape, miscount, retype, retype, retype_all, move, counts, version)
