"""W4A8 files of the tiny VLM with arbitrary static ranges, and their effect in a running model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mbq_gguf.formats.gguf_types import import_gguf
from nearest_files import write_nearest
from PIL import Image

SITES = ("qkv", "o", "gate_up", "down")
LAYERS = 3
TEXT, VISION, DYNAMIC = 4.0, 4000.0, 0.0
LEAST = 65  # rows of a batch with static ranges
WORDS = "The quick brown fox jumps over the lazy dog and runs into the deep dark forest. " * 6


def keys(text: float = TEXT, vision: float = VISION, **more: Any) -> dict[str, Any]:
    """A layer's ranges differ by a quarter from its neighbour's, so that a site of the wrong layer shows too."""
    found: dict[str, Any] = {"mbq.act.version": 1}
    for site in SITES:
        for kind, value in (("text", text), ("vision", vision)):
            found[f"mbq.act.range.{site}.{kind}"] = [value * (1 + layer / 4) for layer in range(LAYERS)]
    return found | {f"mbq.act.sink.{name}": values for name, values in more.items()}


def write_plain(tiny_dir: Path, path: Path) -> Path:
    """The tiny VLM as W4A8, without static ranges."""
    return write_nearest(tiny_dir, path, "W4A8")


def write_mmproj(tiny_dir: Path, out: Path) -> Path:
    """Its vision file, which lets pictures have more than 64 tokens."""
    write_mmproj_gguf(tiny_dir, out, mmproj_type="F16")
    data, key = bytearray(out.read_bytes()), b"clip.vision.image_max_pixels"
    struct.pack_into("<II", data, data.index(key) + len(key), 4, 1 << 20)
    out.write_bytes(data)
    return out


def with_keys(data: bytes, metadata: dict[str, Any]) -> bytes:
    """A GGUF file with more keys, put before its own; 32 bytes and multiples of them, so that its tensors stay aligned."""
    added = b"".join(string(name) + value(content) for name, content in metadata.items())
    room = string("test.room") + struct.pack("<IQ", 8, 0)
    filled = -(len(added) + len(room)) % 32
    added += string("test.room") + struct.pack("<IQ", 8, filled) + bytes(filled)
    count = struct.unpack_from("<Q", data, 16)[0] + len(metadata) + 1
    return data[:16] + struct.pack("<Q", count) + added + data[24:]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def value(content: Any) -> bytes:
    """A key's type and value; whole numbers are u32 by themselves and i32 in an array, as the converter writes them."""
    if isinstance(content, list):
        kind, form = (6, "f") if isinstance(content[0], float) else (5, "i")
        return struct.pack(f"<IIQ{len(content)}{form}", 9, kind, len(content), *content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + string(content)
    return struct.pack("<If", 6, content) if isinstance(content, float) else struct.pack("<II", 4, content)


class Seen:
    """The ranges of every micro-batch that had any: of all rows, and of those behind the last attention."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.out: list[np.ndarray] = []

    @property
    def watch(self) -> dict[str, Any]:
        return {"mbq_act_ranges": self.rows.append, "mbq_act_ranges_out": self.out.append}

    def classes(self) -> list[list[float]]:
        """The class of every row, by micro-batch: each row's ranges are those of one class at all sites."""
        return [classes(ranges) for ranges in self.rows]


def classes(ranges: np.ndarray) -> list[float]:
    layers = np.repeat(1 + np.arange(LAYERS) / 4, len(SITES))
    first = ranges[:, 0]
    assert np.allclose(ranges, first[:, None] * layers, rtol=1e-6)
    return [float(value) for value in first]


def decode(model: Model, rows: Sequence[tuple[int, int, int, bool]], embeddings: np.ndarray | None = None) -> np.ndarray:
    """Run ``rows`` (token, position, sequence, logits wanted) as one batch: logits [wanted, vocabulary]. ``embeddings`` replace tokens."""
    ffi, c = model._binding.ffi, model._binding.c
    width = 0 if embeddings is None else embeddings.shape[1]
    batch = c.llama_batch_init(len(rows), width, 1)
    try:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            if embeddings is None:
                batch.token[i] = token
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
            batch.pos[i] = position
        if embeddings is not None:
            ffi.memmove(batch.embd, ffi.from_buffer(embeddings), embeddings.nbytes)
        assert c.llama_decode(model._context, batch) == 0
    finally:
        c.llama_batch_free(batch)
    found = [c.llama_get_logits_ith(model._context, i) for i, row in enumerate(rows) if row[3]]
    return np.array([np.frombuffer(ffi.buffer(row, 4 * model.vocabulary_size), np.float32) for row in found])


def rows(model: Model, count: int, wanted: Sequence[int] = (), sequence: int = 0, start: int = 0) -> list[tuple[int, int, int, bool]]:
    tokens = model.tokenize(WORDS)[:count]
    assert len(tokens) == count
    return [(token, start + i, sequence, i in wanted) for i, token in enumerate(tokens)]


class Settled(Model):
    """With a context of one's own: ``settle`` changes its parameters."""

    def __init__(self, *arguments: Any, settle: Callable[[Any, Any], None], **options: Any) -> None:
        self.settle = settle
        super().__init__(*arguments, **options)

    def _open_context(self, *arguments: Any) -> Any:
        c, defaults = self._binding.c, self._binding.c.llama_context_default_params

        def parameters() -> Any:
            found = defaults()
            self.settle(c, found)
            return found

        c.llama_context_default_params = parameters
        try:
            return super()._open_context(*arguments)
        finally:
            c.llama_context_default_params = defaults


def picture(folder: Path, side: int) -> Path:
    path = folder / f"{side}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def write_adapter(path: Path) -> None:
    """A LoRA of rank 2 on one matrix of the tiny VLM."""
    writer = import_gguf().GGUFWriter(path, "qwen2vl")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    random = np.random.default_rng(0)
    for end, shape in (("lora_a", (2, 128)), ("lora_b", (128, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.{end}", random.standard_normal(shape).astype(np.float32))
    write_gguf(writer)


def write_gguf(writer: Any) -> None:
    """Write out what a GGUFWriter has been given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
