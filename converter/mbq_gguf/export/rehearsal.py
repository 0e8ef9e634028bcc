"""Rehearses the conversion without weights, to detect before calibration what would fail or silently go wrong hours later."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq_gguf.errors import UserError
from mbq_gguf.export.checkpoint import names_of
from mbq_gguf.export.conversion import conversion_errors, open_model, quiet
from mbq_gguf.export.gguf_writer import BASE_TYPES, VisionFile, injected, prepare, vision_injection
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.models.suspects import describe_failure

# Parts that a file for pictures and text does not need, and buffers that are recomputed.
LEFT_OUT = re.compile(
    r"(?:^|\.)(?:\w*audio\w*|mtp|nextn|talker|token2wav|code2wav|speech\w*|sound\w*)\.|(?:inv_freq|position_ids|masked_bias|_mask)$"
)
LAYER = re.compile(r"\.layers\.(\d+)\.")


def rehearse(model_dir: Path, files: Sequence[Path], mmproj_type: str | None) -> None:
    """Convert ``model_dir`` with weights in ``files``, without reading them or writing anything. ``mmproj_type`` None: only the language
    model.

    Raises UserError if llama.cpp's conversion rejects the tensors, the tokenizer or the configuration, where one of the two files
    would be empty, if a tensor belongs to neither, or if the tokenizer has more tokens than the embeddings have rows.
    """
    parts = []
    for mmproj, file_type in ((False, BASE_TYPES[0]), *(((True, mmproj_type),) if mmproj_type else ())):
        model = open_model(model_dir, model_dir / "rehearsal.gguf", file_type=file_type, mmproj=mmproj)
        if not mmproj:
            check_vocabulary(model_dir, model)
        prepare(model, model_dir)
        check_metadata(model, model_dir)
        if not any(model.gguf_writer.tensors):
            part = "vision tower" if mmproj else "language model"
            raise UserError(
                f"llama.cpp's conversion finds no tensor of the {part} in {model_dir}: use a checkpoint in transformers' layout"
            )
        parts.append(model)
    lost = list(lost_names(parts, names_of(files))) if mmproj_type else []
    if lost:
        raise UserError(
            f"llama.cpp's conversion does not support {len(lost)} tensors of {model_dir}, {lost[0]} first: "
            "use a checkpoint with only the model's own weights"
        )


def rehearse_quantised(model_dir: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Run quantised dummy weights of ``shapes`` [out, in], by decoder key, through the conversion of ``model_dir``.

    Raises UserError if the conversion drops one, expects another shape, or does more than permute rows.
    """
    model = open_model(model_dir, model_dir / "rehearsal.gguf", file_type=BASE_TYPES[0], mmproj=False)
    weights = {
        key: QuantisedTensor("F16", np.broadcast_to(np.uint8(0), (rows, 2 * columns)), columns) for key, (rows, columns) in shapes.items()
    }
    injection = injected(model, weights, {}, None)
    with quiet(), torch.inference_mode(), conversion_errors(model_dir):
        model.prepare_tensors()
    injection.check_used()


def rehearse_tower(model_dir: Path, content: VisionFile) -> None:
    """The same for a vision file with quantised matrices."""
    model = open_model(model_dir, model_dir / "rehearsal.gguf", file_type=BASE_TYPES[1], mmproj=True)
    injection = vision_injection(model, content)
    with quiet(), torch.inference_mode(), conversion_errors(model_dir):
        model.prepare_tensors()
    injection.check_used()


def lost_names(parts: Sequence[Any], names: Sequence[str]) -> Iterator[str]:
    """The tensors that no part of the conversion uses, apart from those dropped on purpose."""
    layers = parts[0].block_count
    for name in names:
        found = LAYER.search(name)
        if LEFT_OUT.search(name) or (found and int(found[1]) >= layers):  # extra layers are for multi-token prediction
            continue
        if all(part.filter_tensors((name, lambda: None)) is None for part in parts):
            yield name


def check_metadata(model: Any, model_dir: Path) -> None:
    """Raise UserError if a configuration value does not fit its GGUF type, which would otherwise fail at the end."""
    writer = model.gguf_writer
    for shard in writer.kv_data:
        for key, value in shard.items():
            try:
                writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
            except Exception as error:  # struct, numpy and str raise different ones
                why = describe_failure(error, model_dir)
                raise UserError(
                    f"{key} cannot be {str(value.value)[:80]!r} as the configuration of {model_dir} says ({why}): download it again"
                ) from error


def check_vocabulary(model_dir: Path, model: Any) -> None:
    """Raise UserError if tokenizer.json has a token for which the embeddings of ``model`` have no row, or config.json tells of more
    tokens than these have rows: the conversion makes up each that is missing, a billion for hours."""
    from tokenizers import Tokenizer

    file = model_dir / "tokenizer.json"
    rows = next((get().shape[0] for name, get in model.model_tensors.items() if name.endswith("embed_tokens.weight")), None)
    if rows is None:
        return
    asked = model.hparams.get("vocab_size", rows)
    if asked > rows:
        raise UserError(
            f"vocab_size in {model_dir}'s config.json is {asked} and the embeddings have {rows} rows: "
            "download the model again, or resize its embeddings"
        )
    if not file.is_file():
        return
    try:
        tokens = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1) + 1
    except Exception as error:  # tokenizers raises bare ones
        raise UserError(f"{file} is not a tokenizer ({str(error).splitlines()[0]}): download the tokenizer again") from error
    if tokens > rows:
        raise UserError(
            f"the tokenizer of {model_dir} has {tokens} tokens and the embeddings {rows} rows: "
            "download the tokenizer of this model, or resize its embeddings"
        )
