"""What a GGUF file tells of its layers: sensitivity ratios from its metadata, and how far its weights are from the reference's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mbq_cbind.types import dequantize

from mbq_gguf.evaluate.results import Layers
from mbq_gguf.export.gguf_header import Header
from mbq_gguf.export.metadata import RATIO
from mbq_gguf.formats.gguf_types import import_gguf

MATRIX = re.compile(r"blk\.(\d+)\.(attn|ffn)_\w+\.weight")
ROWS = 256  # of each matrix, evenly spaced: enough for a mean over some 100 000 weights
FITS = 6  # alternations of the factor fit; the error has settled to 4 digits after 3

Doubles = npt.NDArray[np.float64]


def layers(path: Path, header: Header, reference: Path | None) -> Layers:
    """Ratios of the file, and its weight errors against ``reference`` (None: no errors, for the reference itself)."""
    errors = weight_errors(path, reference) if reference else {"attn": [], "ffn": []}
    return Layers(_ratios(header, "attention"), _ratios(header, "mlp"), errors["attn"], errors["ffn"])


def layer_bits(header: Header) -> float:
    """Bits a weight over the matrices of the decoder's layers; 0 where there are none."""
    matrices = [tensor for tensor in header.tensors if MATRIX.fullmatch(tensor.name) and len(tensor.shape) > 1]
    weights = sum(tensor.elements for tensor in matrices)
    return 8 * sum(tensor.nbytes for tensor in matrices) / weights if weights else 0.0


def weight_errors(path: Path, reference: Path) -> dict[str, list[float]]:
    """Relative squared error ||W' - W||^2 / ||W||^2 per layer over its attention ("attn") and feed-forward ("ffn") matrices."""
    matrices, originals = _matrices(path), _matrices(reference)
    wrong: dict[str, dict[int, list[float]]] = {"attn": defaultdict(lambda: [0.0, 0.0]), "ffn": defaultdict(lambda: [0.0, 0.0])}
    for name in originals.keys() & matrices.keys():
        match = MATRIX.fullmatch(name)
        original, stored = _rows(originals[name]), _rows(matrices[name])
        if match is None or original.shape != stored.shape:
            continue
        sums = wrong[match.group(2)][int(match.group(1))]
        sums[0] += float(((original - fitted(stored, original)) ** 2).sum())
        sums[1] += float((original**2).sum())
    return {part: [sums[layer][0] / max(sums[layer][1], 1e-300) for layer in sorted(sums)] for part, sums in wrong.items()}


def fitted(stored: Doubles, original: Doubles) -> Doubles:
    """``stored`` with the factor for each row and each column that brings it nearest to ``original`` (alternating least squares).

    Equalisation folds factors per channel into neighbouring tensors and leaves the model as it was; they are no error. A matrix of 256 x
    576 has 832 of them, so the fit hides less than 1 % of a rounding error.
    """
    for _ in range(FITS):
        for axis in (0, 1):
            power = (stored**2).sum(axis=axis, keepdims=True)
            stored = stored * ((stored * original).sum(axis=axis, keepdims=True) / np.where(power > 0, power, 1))
    return stored


def _matrices(path: Path) -> Mapping[str, Any]:
    reader = import_gguf().GGUFReader(str(path))
    return {tensor.name: tensor for tensor in reader.tensors if MATRIX.fullmatch(tensor.name) and len(tensor.shape) > 1}


def _rows(tensor: Any) -> Doubles:
    columns = int(tensor.shape[0])
    data = tensor.data.reshape(-1, tensor.data.shape[-1]).view(np.uint8)
    picked = data[np.linspace(0, len(data) - 1, min(ROWS, len(data))).astype(int)]
    return dequantize(int(tensor.tensor_type), picked, columns).astype(np.float64)


def _ratios(header: Header, part: str) -> list[float]:
    value = header.metadata.get(RATIO + part)
    return [float(item) for item in value if isinstance(item, int | float)] if isinstance(value, list) else []
