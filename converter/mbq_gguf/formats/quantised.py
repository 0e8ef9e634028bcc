"""A quantised weight matrix: the one record of it, from rounding to the file."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_gguf.formats.quant_type import Bytes


@dataclass(frozen=True)
class QuantisedTensor:
    """``data`` uint8 [rows, row_bytes] in the quant type ``type_name``, rows of ``columns`` weights, in Hugging Face's order of rows."""

    type_name: str
    data: Bytes
    columns: int
