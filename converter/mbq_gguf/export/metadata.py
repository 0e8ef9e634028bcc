"""The metadata keys that mbq-gguf adds to a GGUF file. llama.cpp ignores unknown keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mbq_gguf
from mbq_gguf.allocation.plan import Plan
from mbq_gguf.formats import row_scale, static_ranges
from mbq_gguf.formats.gguf_types import FILE_TYPES, import_gguf
from mbq_gguf.formats.row_scale import stored_as

FORMAT_VERSION = 1  # increased when old files must not be read like new ones
PREFIX = "mbq."
RATIO = "mbq.ratio."  # + "attention" or "mlp"
# The patched llama.cpp rejects other versions.
KNOWN_VERSIONS = {"mbq.row_scale.version": row_scale.VERSION, static_ranges.VERSION_KEY: static_ranges.VERSION}

# llama.cpp's names for K-quants are mixtures, not types; a file with a single type gets the name of the simplest mixture.
STOCK_FILE_TYPES = {"Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "Q2_K": "MOSTLY_Q2_K_S"}


def file_type(type_name: str) -> int | None:
    """``general.file_type`` of a file with matrices of ``type_name``; None if llama.cpp has no number for it."""
    stored = stored_as(type_name)
    name = STOCK_FILE_TYPES.get(stored, "ALL_F32" if stored == "F32" else f"MOSTLY_{stored}")
    if name in FILE_TYPES:
        return FILE_TYPES[name]
    known = import_gguf().LlamaFileType.__members__
    return int(known[name]) if name in known else None


def describe(
    *,
    type_name: str,
    method: str,
    rounding: str,
    fingerprint: str,
    samples: int,
    synthetic: int,
    ratios: Mapping[str, Sequence[float]],
    token_weights: str,
) -> dict[str, Any]:
    """The metadata of a quantised file, by key; ``type_name`` is "mixed" if tensors have different types.

    ``fingerprint`` is the SHA-256 of the calibration set as it was used ("" where none was), ``samples`` its size and ``synthetic`` the
    number of texts that the model wrote beside it, with half as many pictures; ``ratios`` holds, per layer, vision over
    language sensitivity of the "attention" and "mlp" outputs (MBQ, arXiv 2412.19509), and is empty where the method does not use it.
    """
    keys: dict[str, Any] = {
        "general.quantized_by": "mbq-gguf",
        "mbq.version": FORMAT_VERSION,
        "mbq.tool": f"mbq-gguf {mbq_gguf.__version__}",
        "mbq.type": type_name,
        "mbq.method": method,
        "mbq.rounding": rounding,
        "mbq.token_weights": token_weights,
        "mbq.calibration.fingerprint": fingerprint,
        "mbq.calibration.samples": samples,
        "mbq.calibration.synthetic": synthetic,
    }
    return keys | {RATIO + part: [float(value) for value in values] for part, values in ratios.items()}


def version_sentences(keys: Mapping[str, Any]) -> list[str]:
    """Why the patched llama.cpp will not load a file with this metadata: one sentence for each unknown version."""
    return [
        f"{key} is {keys[key]!s:.20}, and the llama.cpp of this mbq-gguf knows {known}: it will not load the file, a later one may"
        for key, known in KNOWN_VERSIONS.items()
        if keys.get(key, known) != known
    ]


def gptq(*, clip: bool, propagate_error: bool, error_correction: float, refits: int, learn_scales: int) -> dict[str, Any]:
    """The settings of GPTQ's extensions, under the keys of the first release of the format."""
    found = {"clip": clip, "distort": propagate_error, "correction": error_correction, "refits": refits, "refine": learn_scales}
    return {f"mbq.gptq.{name}": value for name, value in found.items()}


def allocated(plan: Plan, measured: Mapping[str, float]) -> dict[str, Any]:
    """The size of a file with allocated types (bits per weight of the decoder's matrices), and its predicted and measured loss (nats)."""
    return {
        "mbq.allocation.bits_per_weight": plan.bits_per_weight,
        "mbq.allocation.predicted_loss": plan.predicted,
        "mbq.allocation.measured_loss": sum(measured.values()),
    }
