"""A quantised weight matrix, between rounding and the file."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_gguf.formats.quant_type import Bytes


@dataclass(frozen=True)
class QuantisedTensor:
    """``data`` uint8 [rows, row_bytes] in the quant type ``type_name``; each row has ``columns`` weights. Rows are in Hugging Face's
    order."""

    type_name: str
    data: Bytes
    columns: int
