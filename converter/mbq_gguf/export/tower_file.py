"""The contents of a vision file with one scale per row that are known without weights: shapes, padding, keys."""

from __future__ import annotations

import numpy as np
import torch

from mbq_gguf.calibration.tower_ranges import ESTIMATOR, tower_range_keys
from mbq_gguf.export.gguf_writer import FEED_FORWARD, VisionFile
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.formats.static_ranges import SITES
from mbq_gguf.models.tower import BLOCK, PADDED, Tower, linear
from mbq_gguf.settings import Activations


def quantised_shapes(tower: Tower) -> dict[str, tuple[int, int]]:
    """Rows and columns, after padding, of every matrix that is quantised, by the ends of their names."""
    wide = padded_width(tower)
    down, ups = tower.layout.sites[3].readers[0], tower.layout.sites[2].readers
    found = {}
    for index, block in enumerate(tower.blocks):
        for name in tower.layout.readers:
            rows, columns = linear(block, name).weight.shape
            shape = (rows, wide or columns) if name == down else (wide or rows, columns) if name in ups else (rows, columns)
            found[f"{tower.block_name(index)}.{name}.weight"] = shape
    for groups in tower.exit_groups():
        found |= {f"{name}.weight": (module.out_features, module.in_features) for name, module in groups.items()}
    return found


def padded_width(tower: Tower) -> int:
    """The padded feed-forward width if the tower's own is not a multiple of 32, else 0."""
    width = linear(tower.blocks[0], tower.layout.sites[3].readers[0]).in_features
    return 0 if width % BLOCK == 0 else -(-width // PADDED) * PADDED


def tower_file(tower: Tower, type_name: str, activations: Activations = "dynamic") -> VisionFile:
    """The contents of a file of ``tower`` in ``type_name``, as zeros that take no memory."""
    found, replaced, wide = {}, {}, padded_width(tower)
    for name, (rows, columns) in quantised_shapes(tower).items():
        kept = quant_type_for(type_name, columns)
        found[name] = QuantisedTensor(kept.name, np.broadcast_to(np.uint8(0), (rows, kept.row_bytes(columns))), columns)
    for index, block in enumerate(tower.blocks if wide else ()):
        for name in tower.layout.sites[2].readers:
            if linear(block, name).bias is not None:
                replaced[f"{tower.block_name(index)}.{name}.bias"] = torch.zeros(()).expand(wide)
    keys = tower_range_keys(ESTIMATOR, [[0.0] * len(SITES)] * len(tower.blocks)) if activations == "static" else {}
    return VisionFile(found, replaced, keys | ({FEED_FORWARD: wide} if wide else {}))
