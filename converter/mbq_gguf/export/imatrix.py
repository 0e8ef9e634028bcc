"""Writes an importance matrix as llama.cpp's GGUF file, which ``llama-quantize --imatrix`` reads (common/imatrix-loader.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq_gguf.calibration.importance import Importance
from mbq_gguf.errors import UserError
from mbq_gguf.export.atomic import staged
from mbq_gguf.export.conversion import conversion_errors, decoder_names, open_model, quiet
from mbq_gguf.formats.gguf_types import import_gguf


def write_imatrix(model_dir: Path, out: Path, found: Importance, dataset: str) -> list[str]:
    """Write ``found`` for the GGUF files of ``model_dir`` to ``out``, completely or not at all; returns the names of the tensors in it.

    ``dataset`` is the name of the calibration set, for the file's metadata. Raises UserError if llama.cpp's conversion leaves out a tensor,
    or ``out`` cannot be written.
    """
    names = gguf_names(model_dir)
    entries: dict[str, torch.Tensor] = {}
    for key, sums in found.sums.items():
        if key not in names:
            raise UserError(f"llama.cpp's conversion leaves out {key}: this model is not supported")
        entries |= dict.fromkeys(names[key], sums)
    gguf = import_gguf()
    with staged(out) as (part,), quiet():
        writer = gguf.GGUFWriter(part, "imatrix")
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [dataset])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, found.samples)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, found.tokens // found.samples)
        for name in sorted(entries):
            writer.add_tensor(f"{name}.in_sum2", entries[name].float().numpy()[None])
            writer.add_tensor(f"{name}.counts", np.full((1, 1), found.tokens, np.float32))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return sorted(entries)


def gguf_names(model_dir: Path) -> dict[str, list[str]]:
    """For each decoder tensor (``layers.0.mlp.up_proj.weight``), the GGUF tensors made from it. No weights are read."""
    model = open_model(model_dir, model_dir / "names.gguf", file_type="BF16", mmproj=False)
    keys = {name: key for key, name in decoder_names(model.model_tensors).items()}
    made: dict[str, list[str]] = {}
    modify = model.modify_tensors

    def recorded(data: Any, name: str, bid: int | None) -> list[tuple[str, Any]]:
        outputs = list(modify(data, name, bid))
        if name in keys:
            made[keys[name]] = [output for output, _ in outputs]
        return outputs

    model.modify_tensors = recorded
    with quiet(), torch.inference_mode(), conversion_errors(model_dir):
        model.prepare_tensors()
    return made
