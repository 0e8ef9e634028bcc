"""Imports the ``gguf`` package: the right copy of it, with the MBQ types registered.

PyPI's gguf and gguf-py in the pinned llama.cpp differ but have the same version number, and the conversion package needs the latter. So the
llama.cpp tree, if there is one, takes precedence over what is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mbq_gguf.errors import UserError
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import Bytes, Floats, QuantType
from mbq_gguf.llama_cpp import paths

# llama_ftype, the value of general.file_type; for these types the same number as the ggml type's
FILE_TYPES = {f"MOSTLY_{name}": quant_type.type_id for name, quant_type in OWN.items()}


def import_gguf() -> ModuleType:
    """The ``gguf`` module of the llama.cpp tree in use, or the installed one if nothing is built, with the MBQ types registered."""
    try:
        folder = paths.source_dir() / "gguf-py"
    except UserError:
        module = importlib.import_module("gguf")
    else:
        module = import_from_tree("gguf", folder)
    register(module)
    return module


def import_from_tree(name: str, folder: Path) -> ModuleType:
    """Import the package ``name`` from ``folder``, even if another copy of it is installed or already loaded.

    Raises UserError if ``folder`` has no such package.
    """
    if not (folder / name / "__init__.py").is_file():
        raise UserError(f"{folder} has no package {name}: run `mbq-gguf build` again")
    loaded = sys.modules.get(name)
    if loaded is not None and Path(loaded.__file__ or "").resolve().parent != (folder / name).resolve():
        for module in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
            del sys.modules[module]
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def register(gguf: Any) -> None:
    """Register the MBQ types with ``gguf``: type enumeration, block sizes, numpy quantiser, file types. Existing entries are kept."""
    for quant_type in OWN.values():
        kind = _member(gguf.GGMLQuantizationType, quant_type.name, quant_type.type_id)
        gguf.GGML_QUANT_SIZES.setdefault(kind, (quant_type.block_size, quant_type.type_size))
        if kind not in gguf.quants._type_traits:
            _quantiser(gguf.quants, kind, quant_type)
    for name, value in FILE_TYPES.items():
        _member(gguf.LlamaFileType, name, value)


def _member(enumeration: type[IntEnum], name: str, value: int) -> IntEnum:
    """The member ``name`` of ``enumeration``, added if missing. Enum has no public way to add one, so this sets its internal fields."""
    if name in enumeration.__members__:
        return enumeration[name]
    member = int.__new__(enumeration, value)
    member._name_ = name
    member._value_ = value
    type.__setattr__(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    return member


def _quantiser(quants: Any, kind: IntEnum, quant_type: QuantType) -> None:
    """Define a class for ``kind`` in ``gguf.quants``; the base class registers it."""

    def per_block(convert: Callable[[Any], Any]) -> classmethod[Any, ..., Any]:
        return classmethod(lambda _, blocks: convert(blocks))

    def quantise(blocks: Floats) -> Bytes:
        return quant_type.quantize(np.ascontiguousarray(blocks, np.float32))

    members = {"quantize_blocks": per_block(quantise), "dequantize_blocks": per_block(quant_type.dequantize)}
    type(quant_type.name, (quants.__Quant,), members, qtype=kind)
