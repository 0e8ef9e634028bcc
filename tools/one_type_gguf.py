"""Writes language models with random weights of one type as GGUF files, to measure speed."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_writer import add_metadata
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.llama_cpp import paths
from rich.console import Console

# Name in the table -> file type of llama-quantize. All are written with --pure: every matrix of the layers has the one type.
FILE_TYPES = {
    "F16": "F16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_K": "Q4_K_S",
    "IQ3_S": "IQ3_S",
    "Q3_K": "Q3_K_S",
    "MBQ3": "MBQ3",
    "MBQ3_64": "MBQ3_64",
    "MBQ3S": "MBQ3S",
    "MBQ3S_64": "MBQ3S_64",
    "W4A8": "Q4_0",  # its blocks, with one scale per row
    "W8A8": "Q8_0",
}
# Layer shapes of Qwen2-VL-2B (its config.json); the vocabulary is cut so that the layers, not the output head, are what is timed.
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1536, 8960, 12, 2, 128, 1024

Tensors = dict[str, tuple[Any, Any]]  # name -> values or packed rows, ggml type


def random_layer(seed: int) -> Tensors:
    """Embedding, output norm and one layer of a Qwen2-VL decoder with random weights, matrices in F16."""
    gguf = import_gguf()
    random = np.random.default_rng(seed)
    kinds = gguf.GGMLQuantizationType
    tensors: Tensors = {"output_norm.weight": (np.ones(HIDDEN, np.float32), kinds.F32)}
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM)}
    for name, size in (("attn_q", HEADS * HEAD_DIM), ("attn_k", KV_HEADS * HEAD_DIM), ("attn_v", KV_HEADS * HEAD_DIM)):
        shapes[f"blk.0.{name}"] = (size, HIDDEN)
        tensors[f"blk.0.{name}.bias"] = (np.zeros(size, np.float32), kinds.F32)
    shapes |= {"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)}
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}.weight"] = (np.ones(HIDDEN, np.float32), kinds.F32)
    for name, (rows, columns) in shapes.items():
        values = random.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
        tensors[f"{name}.weight"] = (values.astype(np.float16), kinds.F16)
    return tensors


def with_row_scales(tensors: Tensors) -> Tensors:
    """The same, but each block of the layer's matrices has the scale of its row's first block: other weights, the same speed."""
    gguf = import_gguf()
    changed: Tensors = {}
    for name, (values, kind) in tensors.items():
        if name.startswith("blk.") and values.dtype == np.uint8:
            _, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = np.array(values).reshape(len(values), -1, size)
            blocks[:, :, :2] = blocks[:, :1, :2]
            values = blocks.reshape(len(values), -1)
        changed[name] = (values, kind)
    return changed


def write_model(path: Path, tensors: Tensors, layers: int, row_scales: bool = False) -> None:
    """Write a GGUF without a tokenizer in which each of ``layers`` layers is a copy of ``blk.0``; `path` appears when it is complete."""
    gguf = import_gguf()
    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "qwen2vl")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_sections([16, 24, 24, 0])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for layer in range(layers):
        for name, (values, kind) in tensors.items():
            if name.startswith("blk.0."):
                writer.add_tensor(name.replace("blk.0.", f"blk.{layer}."), values, raw_dtype=kind)
            elif layer == 0:
                writer.add_tensor(name, values, raw_dtype=kind)
    if row_scales:
        matrices = [name for name, (values, _) in tensors.items() if name.startswith("blk.") and values.dtype == np.uint8]
        names = [name.replace("blk.0.", f"blk.{layer}.") for layer in range(layers) for name in matrices]
        for key, value in row_scale.metadata(names).items():
            add_metadata(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def prepare_models(folder: Path, names: Sequence[str], layers: int, threads: int, console: Console) -> dict[str, Path]:
    """The GGUF files of ``names`` in ``folder``, made if missing. Only one layer is quantised, then copied."""
    gguf = import_gguf()
    models = {name: folder / f"random-{layers}-{name}.gguf" for name in names}
    missing = {name: model for name, model in models.items() if not model.exists()}
    if not missing:
        return models
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, packed = Path(temporary, "source.gguf"), Path(temporary, "packed.gguf")
        write_model(source, random_layer(seed=0), layers=1)
        for name, model in missing.items():
            console.print(f"quantising to {name}")
            command: list[str | Path] = [paths.find_program("llama-quantize"), "--pure"]
            command += ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
            run([*command, source, packed, FILE_TYPES[name], str(threads)])
            reader = gguf.GGUFReader(packed)
            tensors: Tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
            one_scale = name in row_scale.ROW_SCALES
            write_model(model, with_row_scales(tensors) if one_scale else tensors, layers, one_scale)
    return models


def bits_per_weight(model: Path) -> float:
    """Bits per weight of the layers' matrices, scales included."""
    gguf = import_gguf()
    tensors = [tensor for tensor in gguf.GGUFReader(model).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return float(8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors))


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{Path(command[0]).name} failed ({last}): run it by hand to see more: {' '.join(str(part) for part in command)}")
    return done.stdout
