"""Writes models with random weights, to measure speed: the right shapes and types, sane scales, and no tokenizer unless one is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mbq_gguf.export.gguf_writer import add_metadata
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.transforms import hadamard
from numpy.typing import NDArray

# Offsets of a block's fp16 scales (and minimums): random bits there could be infinite.
SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q3_K": [108],
    "IQ4_XS": [0],
    "IQ3_S": [0],
    "IQ3_XXS": [0],
    "MBQ3": [0, 2],
    "MBQ3_64": [0, 2],
    "MBQ3S": [0, 2],  # scale words: as fp16 scales they are finite, and small
    "MBQ3S_64": [0, 2],
}
MATRICES = ("F16", *SCALES, *row_scale.ROW_SCALES)  # types of random matrices
TOWERS = (*MATRICES, *(f"{name}:dynamic" for name in row_scale.ROW_SCALES))  # what write_random_tower() takes
MIXTURES = (*MATRICES, "Q4_K_M", "Q3_K_M")  # what write_random_gguf() takes
PATTERN_BLOCKS = 1 << 16  # random blocks, repeated to fill a matrix


@dataclass(frozen=True)
class LanguageShape:
    """The sizes of a Qwen2-like decoder."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int


QWEN2_VL_7B = LanguageShape(28, 3584, 18944, 28, 4, 152064)
QWEN2_VL_2B = LanguageShape(28, 1536, 8960, 12, 2, 151936)
TOWER = (32, 1280)  # blocks and width of the vision tower of both
RANGES = {"qkv": 5.0, "o": 100.0, "gate_up": 5.0, "down": 150.0}  # of its sites' activations: norms', and what random weights make of them


def more_bits(layer: int, layers: int) -> bool:
    """The layers to which llama-quantize's _M mixtures give more bits: the first and last eighth and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(mixture: str, kind: str, layer: int, layers: int) -> str:
    """The type that llama-quantize gives a matrix (``attn_v``, ``ffn_down``, ...) of a dense model with many query heads per key head."""
    if kind == "output":
        return "Q6_K"
    if kind == "token_embd":
        return "Q8_0" if mixture.startswith("MBQ") or mixture in row_scale.ROW_SCALES else mixture.removesuffix("_M")
    if mixture == "Q4_K_M":
        return "Q6_K" if kind in ("attn_v", "ffn_down") and more_bits(layer, layers) else "Q4_K"
    if mixture == "Q3_K_M":
        if kind == "attn_v":
            return "Q5_K" if layer < 2 else "Q4_K"
        if kind == "ffn_down":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        return "Q4_K" if kind == "attn_output" else "Q3_K"
    return row_scale.stored_as(mixture)


def random_matrix(gguf: Any, type_name: str, rows: int, columns: int) -> NDArray[Any]:
    """Random blocks [rows, bytes per row] (F16: values [rows, columns]) with scales of 0.01."""
    rng = np.random.default_rng(0)
    if type_name == "F16":
        return np.resize(rng.standard_normal(PATTERN_BLOCKS).astype(np.float16), (rows, columns))
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    pattern = rng.integers(0, 256, (PATTERN_BLOCKS, size), dtype=np.uint8)
    for offset in SCALES[type_name]:
        pattern[:, offset : offset + 2] = np.array([0.01], "<f2").view(np.uint8)
    return np.resize(pattern, (rows, columns // block * size))


def add_shape(writer: Any, shape: LanguageShape) -> None:
    """Write the metadata for the language model's sizes."""
    writer.add_block_count(shape.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.embedding)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_sections([16, 24, 24, 0])
    writer.add_vocab_size(shape.vocabulary)


def write_random_gguf(
    path: Path, shape: LanguageShape, mixture: str, tokenizer: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a Qwen2-VL language model of this shape. ``mixture``: Q4_K_M, Q3_K_M, or one type for all matrices of the layers.

    ``tokenizer`` is its metadata, for as many tokens as the shape's vocabulary has; ``metadata`` is additional metadata.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, "qwen2vl")
    add_shape(writer, shape)
    for name, value in {**(tokenizer or {"tokenizer.ggml.model": "none"}), **(metadata or {})}.items():
        add_metadata(writer, name, value)

    matrices: dict[tuple[str, int, int], NDArray[Any]] = {}  # equal ones are one array
    of_layers: list[str] = []
    width = shape.embedding // shape.heads * shape.kv_heads

    def matrix(name: str, kind: str, layer: int, rows: int, columns: int) -> None:
        key = (tensor_type(mixture, kind, layer, shape.layers), rows, columns)
        if key not in matrices:
            matrices[key] = random_matrix(gguf, *key)
        writer.add_tensor(name, matrices[key], raw_dtype=gguf.GGMLQuantizationType[key[0]])

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", "token_embd", 0, shape.vocabulary, shape.embedding)
    matrix("output.weight", "output", 0, shape.vocabulary, shape.embedding)
    vector("output_norm.weight", shape.embedding, 1.0)
    for i in range(shape.layers):
        per_layer: list[tuple[str, int, int]] = [
            ("attn_q", shape.embedding, shape.embedding),
            ("attn_k", width, shape.embedding),
            ("attn_v", width, shape.embedding),
            ("attn_output", shape.embedding, shape.embedding),
            ("ffn_gate", shape.feed_forward, shape.embedding),
            ("ffn_up", shape.feed_forward, shape.embedding),
            ("ffn_down", shape.embedding, shape.feed_forward),
        ]
        for kind, rows, columns in per_layer:
            matrix(f"blk.{i}.{kind}.weight", kind, i, rows, columns)
            if kind in ("attn_q", "attn_k", "attn_v"):
                vector(f"blk.{i}.{kind}.bias", rows, 0.0)
            of_layers.append(f"blk.{i}.{kind}.weight")
        vector(f"blk.{i}.attn_norm.weight", shape.embedding, 1.0)
        vector(f"blk.{i}.ffn_norm.weight", shape.embedding, 1.0)
    if mixture in row_scale.ROW_SCALES:
        rotated = {"mbq.hadamard.ffn_down": hadamard.block_size(shape.feed_forward)}  # as `convert --type W4A8` writes it
        for name, value in (row_scale.metadata(of_layers) | rotated).items():
            add_metadata(writer, name, value)
    finish(writer)


def write_random_tower(path: Path, width: int, kind: str = "F16") -> None:
    """Write Qwen2-VL's vision tower for a language model of this width. ``kind`` is the type of its matrices; the patch embedding is F16.

    W8A8 and W4A8 have static ranges of activations; ``W8A8:dynamic`` has none.
    """
    gguf = import_gguf()
    kind, _, activations = kind.partition(":")
    blocks, size = TOWER
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    vision = {"projection_dim": width, "image_size": 560, "patch_size": 14, "embedding_length": size, "feed_forward_length": 4 * size}
    vision |= {"block_count": blocks, "attention.head_count": size // 80}
    values = {"has_vision_encoder": True, "projector_type": "qwen2vl_merger"} | {f"vision.{name}": value for name, value in vision.items()}
    values |= {"vision.attention.layer_norm_epsilon": 1e-6, "vision.image_mean": [0.5] * 3, "vision.image_std": [0.5] * 3}
    for name, value in values.items():
        add_metadata(writer, f"clip.{name}", value)
    shapes: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": (size, 3, 14, 14), "v.patch_embd.weight.1": (size, 3, 14, 14)}
    shapes |= {"v.post_ln.weight": (size,), "v.post_ln.bias": (size,)}
    for name, rows in (("mm.0", 4 * size), ("mm.2", width)):
        shapes |= {f"{name}.weight": (rows, 4 * size), f"{name}.bias": (rows,)}
    for i in range(blocks):
        linear = {"attn_q": (size, size), "attn_k": (size, size), "attn_v": (size, size), "attn_out": (size, size)}
        linear |= {"ffn_up": (4 * size, size), "ffn_down": (size, 4 * size)}
        for name, (rows, columns) in linear.items():
            shapes |= {f"v.blk.{i}.{name}.weight": (rows, columns), f"v.blk.{i}.{name}.bias": (rows,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"v.blk.{i}.{name}.weight": (size,), f"v.blk.{i}.{name}.bias": (size,)}
    pattern = np.random.default_rng(0).standard_normal(PATTERN_BLOCKS).astype(np.float16) / np.float16(40)
    matrices = [name for name, dimensions in shapes.items() if len(dimensions) == 2]
    stored = row_scale.stored_as(kind)
    for name, dimensions in shapes.items():
        if len(dimensions) == 1:  # a norm's weight must not be 0, or everything after it would be 0
            writer.add_tensor(name, np.full(dimensions, float(name.endswith(".weight")), np.float32))
        elif kind == "F16" or name not in matrices:
            writer.add_tensor(name, np.resize(pattern, dimensions))
        else:
            writer.add_tensor(name, random_matrix(gguf, stored, *dimensions), raw_dtype=gguf.GGMLQuantizationType[stored])
    if kind in row_scale.ROW_SCALES:
        keys = row_scale.metadata(matrices)
        if activations != "dynamic":
            keys |= {"mbq.act.version": 1} | {f"mbq.act.range.{site}.vision": [value] * blocks for site, value in RANGES.items()}
        for name, value in keys.items():
            add_metadata(writer, name, value)
    finish(writer)


def finish(writer: Any) -> None:
    """Write the contents of a GGUFWriter to its file."""
    write: list[Callable[[], None]] = [
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ]
    for step in write:
        step()
