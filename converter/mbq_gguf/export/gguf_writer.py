"""Writes the text GGUF and the mmproj GGUF of a model directory with llama.cpp's conversion, replacing the bytes of some tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UserError
from mbq_gguf.export.atomic import check_space, staged
from mbq_gguf.export.conversion import FILE_TYPES, conversion_errors, decoder_names, open_model, quiet
from mbq_gguf.export.injection import EXPERT, Injection, TensorRecord
from mbq_gguf.export.picture_size import picture_limits
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.snapshot import named_link, source_keys

MMPROJ_TYPES = (*FILE_TYPES, *row_scale.ROW_SCALES)
FEED_FORWARD = "clip.vision.feed_forward_length"  # the padded width replaces the package's value
BASE_TYPES = ("BF16", "F16")
HEAD = "lm_head.weight"
SPARE_BYTES = 64 << 20  # for header, vocabulary and file system, in addition to the tensors

Advance = Callable[[int, int], None]  # (bytes written since the last call, bytes of all tensors)


@dataclass(frozen=True)
class TextFile:
    """The contents of a text GGUF. Keys of ``quantised`` and ``replaced`` are decoder keys (``layers.0.mlp.up_proj.weight``)."""

    quantised: Mapping[str, QuantisedTensor]
    replaced: Mapping[str, torch.Tensor]
    base_type: str
    embedding_type: str
    metadata: Mapping[str, Any]
    file_type: int | None


@dataclass(frozen=True)
class VisionFile:
    """The contents of a vision GGUF, by the ends of the tensors' names in the checkpoint, and its additional metadata."""

    quantised: Mapping[str, QuantisedTensor] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_text_gguf(
    model_dir: Path,
    out: Path,
    *,
    quantised: Mapping[str, QuantisedTensor],
    replaced: Mapping[str, torch.Tensor],
    base_type: str,
    embedding_type: str,
    metadata: Mapping[str, Any],
    file_type: int | None,
    advance: Advance | None = None,
) -> list[TensorRecord]:
    """Write the language model of ``model_dir`` to ``out``, which appears when it is complete.

    ``quantised`` goes in as it is (rows reordered as llama.cpp wants them), ``replaced`` takes the place of the checkpoint's tensor before
    conversion (both in Hugging Face's order of rows, [out, in]), embeddings and output head become ``embedding_type``, every other matrix
    ``base_type`` ("BF16" or "F16"), norms and biases F32. ``metadata`` (str, bool, int, float, list) is added to the file's;
    ``file_type`` is general.file_type, None for the base type's own. Raises UserError if a key is no tensor of the model, where its
    shape differs, or where ``out`` cannot be written.
    """
    content = TextFile(quantised, replaced, base_type, embedding_type, metadata, file_type)
    with staged(out) as (part,):
        return write_text(model_dir, part, content, advance)


def write_mmproj_gguf(
    model_dir: Path,
    out: Path,
    *,
    mmproj_type: str,
    quantised: Mapping[str, QuantisedTensor] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
) -> list[TensorRecord]:
    """Write vision tower and projector of ``model_dir`` to ``out`` in ``mmproj_type`` (F32, F16, BF16, Q8_0), atomically.

    ``quantised`` and ``replaced`` have tensors by the end of their name in the checkpoint; they may have more rows and columns if the tower
    was padded. For W8A8 and W4A8, the matrices are in ``quantised`` and the rest is F16. Raises UserError like :func:`write_text_gguf`.
    """
    with staged(out) as (part,):
        return write_mmproj(model_dir, part, mmproj_type, VisionFile(quantised or {}, replaced or {}, metadata or {}), advance)


def write_text(model_dir: Path, part: Path, content: TextFile, advance: Advance | None) -> list[TensorRecord]:
    """:func:`write_text_gguf` into the file ``part``, for callers that stage several files at once."""
    return _write(*_text(model_dir, part, content), model_dir, advance)


def measure_text(model_dir: Path, scratch: Path, content: TextFile) -> tuple[list[TensorRecord], int]:
    """The tensors of the text GGUF and its size in bytes. Writes only its header, into the folder ``scratch``.

    Of ``quantised`` and ``replaced`` only the shapes matter.
    """
    return _measure(*_text(model_dir, scratch / "text.gguf", content), model_dir)


def measure_mmproj(model_dir: Path, scratch: Path, mmproj_type: str, content: VisionFile) -> tuple[list[TensorRecord], int]:
    """The same for the mmproj GGUF."""
    return _measure(*_mmproj(model_dir, scratch / "mmproj.gguf", mmproj_type, content), model_dir)


def _text(model_dir: Path, part: Path, content: TextFile) -> tuple[Any, Injection, Mapping[str, Any], int | None]:
    model = open_model(model_dir, part, file_type=content.base_type, mmproj=False)
    embedding_type = None if content.embedding_type == content.base_type else content.embedding_type
    return model, injected(model, content.quantised, content.replaced, embedding_type), content.metadata, content.file_type


def injected(
    model: Any, quantised: Mapping[str, QuantisedTensor], replaced: Mapping[str, torch.Tensor], embedding_type: str | None
) -> Injection:
    """The injection of tensors by decoder key into ``model``; UserError if it has no such tensor."""
    names = decoder_names(model.model_tensors)
    if HEAD in replaced and HEAD not in names:  # a rotation unties the head from the embedding
        model.model_tensors[HEAD] = model.model_tensors[names["embed_tokens.weight"]]
        names[HEAD] = HEAD
    experts = {key: tensor for key, tensor in quantised.items() if EXPERT.fullmatch(key)}
    found = {_find(names, key): tensor for key, tensor in quantised.items() if key not in experts}
    return Injection(model, found, {_find(names, key): tensor for key, tensor in replaced.items()}, embedding_type, experts)


def write_mmproj(
    model_dir: Path,
    part: Path,
    mmproj_type: str,
    content: VisionFile,
    advance: Advance | None,
) -> list[TensorRecord]:
    """:func:`write_mmproj_gguf` into the file ``part``."""
    return _write(*_mmproj(model_dir, part, mmproj_type, content), model_dir, advance)


def _mmproj(model_dir: Path, part: Path, mmproj_type: str, content: VisionFile) -> tuple[Any, Injection, Mapping[str, Any], int | None]:
    model = open_model(model_dir, part, file_type=mmproj_base(mmproj_type), mmproj=True)
    limits = picture_limits(model_dir, model.preprocessor_config)
    return model, vision_injection(model, content), {**content.metadata, **limits}, None


def mmproj_base(mmproj_type: str) -> str:
    """The type of unquantised tensors in a vision file of ``mmproj_type``."""
    return "F16" if mmproj_type in row_scale.ROW_SCALES else mmproj_type


def vision_injection(model: Any, content: VisionFile) -> Injection:
    """The injection of a vision file's tensors into ``model``; UserError if it has no such tensor."""
    keys = [*content.quantised, *content.replaced]
    ends = {end: taken for end in keys for taken, name in model.checkpoint_names.items() if f".{name}".endswith(f".{end}")}
    quantised = {_find(ends, end): tensor for end, tensor in content.quantised.items()}
    replaced = {_find(ends, end): tensor for end, tensor in content.replaced.items()}
    if FEED_FORWARD in content.metadata:
        wider = {name: (len(tensor.data), tensor.columns) for name, tensor in quantised.items()}
        for name, shape in (wider | {name: tuple(tensor.shape) for name, tensor in replaced.items()}).items():
            model.model_tensors[name] = lambda shape=shape: torch.zeros(()).expand(shape)
    return Injection(model, quantised, replaced, None)


def _find(names: Mapping[str, str], key: str) -> str:
    try:
        return names[key]
    except KeyError:
        raise UserError(f"the checkpoint has no tensor {key}, which its config.json asks for: download the model again") from None


def _write(
    model: Any, injection: Injection, metadata: Mapping[str, Any], file_type: int | None, model_dir: Path, advance: Advance | None
) -> list[TensorRecord]:
    """Run the conversion of ``model`` with ``injection`` and write its file."""
    _complete(model, injection, metadata, file_type, model_dir)
    writer = model.gguf_writer
    total = sum(record.nbytes for record in injection.records)
    check_space(model.fname_out.parent, total + SPARE_BYTES)
    if advance is not None:
        injection.report_to(lambda written: advance(written, total))
    with quiet(), torch.inference_mode():
        try:
            writer.write_header_to_file(path=model.fname_out)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=False)
        finally:
            writer.close()
    return injection.records


def _measure(
    model: Any, injection: Injection, metadata: Mapping[str, Any], file_type: int | None, model_dir: Path
) -> tuple[list[TensorRecord], int]:
    """The tensors and the size of the file that :func:`_write` would write."""
    _complete(model, injection, metadata, file_type, model_dir)
    writer = model.gguf_writer
    with quiet():
        try:
            writer.write_header_to_file(path=model.fname_out)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
    parts = [model.fname_out.stat().st_size, *(record.nbytes for record in injection.records)]
    return injection.records, sum(writer.ggml_pad(size, writer.data_alignment) for size in parts)


def _complete(model: Any, injection: Injection, metadata: Mapping[str, Any], file_type: int | None, model_dir: Path) -> None:
    """Collect tensors and metadata in the writer of ``model``."""
    prepare(model, model_dir)
    injection.check_used()
    with quiet(), torch.inference_mode():
        writer = model.gguf_writer
        written = {key for shard in writer.kv_data for key in shard}
        for key, value in {**metadata, **source_keys(model_dir), **row_scale.metadata(injection.row_scales)}.items():
            if key == FEED_FORWARD and key in written:
                writer.remove_key(key)
            elif key in written:  # some families' picture limits, and a source named by a model card
                continue
            add_metadata(writer, key, value)
        if file_type is not None:
            writer.remove_key("general.file_type")
            writer.add_file_type(file_type)


def prepare(model: Any, model_dir: Path) -> None:
    """Let the package collect tensors (lazily: no weight is read) and metadata."""
    with quiet(), torch.inference_mode(), conversion_errors(model_dir), named_link(model_dir) as model.dir_model_card:
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)


def add_metadata(writer: Any, key: str, value: Any) -> None:
    """Add ``value`` under ``key`` with the GGUF type that fits: bool, uint32 (int32 below zero), float32, string, or array of these.

    Empty lists are omitted, because GGUF arrays need a type.
    """
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, list(value))
    else:
        raise TypeError(f"metadata {key} has the type {type(value).__name__}, which GGUF cannot hold")
