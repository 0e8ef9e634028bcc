"""Files of a model whose layers are rounded to nearest, in seconds and without calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mbq_gguf.export.gguf_writer import write_text_gguf
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models import LoadedModel, load


def nearest_weights(loaded: LoadedModel, kind: str | Callable[[str], str]) -> dict[str, QuantisedTensor]:
    """Every matrix of the layers in the type ``kind``, or the type that ``kind`` gives for its name, or what its rows fall to."""
    found = {}
    with loaded.whole():
        for key, parameter in loaded.decoder.module.named_parameters():
            if key.startswith("layers.") and parameter.ndim == 2:
                chosen = quant_type_for(kind if isinstance(kind, str) else kind(key), parameter.shape[1])
                found[key] = QuantisedTensor(chosen.name, chosen.quantize(parameter.detach().float().numpy()), parameter.shape[1])
    return found


def write_nearest(
    source: Path,
    out: Path,
    kind: str,
    *,
    base_type: str = "BF16",
    metadata: dict[str, Any] | None = None,
    loaded: LoadedModel | None = None,
) -> Path:
    """The text file of the model in ``source``; embeddings and what no method touches are of ``base_type``."""
    write_text_gguf(
        source,
        out,
        quantised=nearest_weights(loaded or load(source), kind),
        replaced={},
        base_type=base_type,
        embedding_type=base_type,
        metadata=metadata or {},
        file_type=None,
    )
    return out
