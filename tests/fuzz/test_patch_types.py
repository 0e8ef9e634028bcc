"""The two frames of Qwen2-VL's first convolution may have different types in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mutators.gguf_document import copy_of
from rich.console import Console
from static_files import picture

FRAMES = (b"v.patch_embd.weight", b"v.patch_embd.weight.1")
F16 = 1  # of ggml_type


@pytest.fixture(scope="module")
def text(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "tiny.gguf"
    convert(ConvertOptions(tiny_dir, out, type="BF16", rounding="nearest"), Console(quiet=True))
    return out


def with_frames_in_f16(path: Path, frames: tuple[bytes, ...]) -> bytes:
    """The file in F32 with these frames' weights in F16."""
    document = copy_of(path.read_bytes())
    data = bytearray(document.data)
    for index, tensor in enumerate(document.tensors):
        if tensor.name in frames:
            values = np.frombuffer(document.data, np.float32, int(np.prod(tensor.dims)), tensor.offset).astype(np.float16)
            data[tensor.offset : tensor.offset + values.nbytes] = values.tobytes()
            document.tensors[index] = tensor._replace(kind=F16)
    document.data = bytes(data)
    document.pack()
    return document.write()


@pytest.mark.parametrize("frames", [FRAMES, FRAMES[:1], FRAMES[1:]])
def test_frames_of_any_types(frames: tuple[bytes, ...], text: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Of two types they once ended the process. Weights rounded to F16 move the embeddings of a picture little (measured: by 0.00004 of
    their norm at most)."""
    exact, mixed = tmp_path / "exact.gguf", tmp_path / "mixed.gguf"
    write_mmproj_gguf(tiny_dir, exact, mmproj_type="F32")
    mixed.write_bytes(with_frames_in_f16(exact, frames))
    found = []
    for mmproj in (exact, mixed):
        with Model(text, mmproj, context=256, threads=1) as model:
            found.append(np.concatenate(model.vision.encode(picture(tmp_path, 112)).embeddings))
    moved = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    print(f"moved by {moved:.6f}")
    assert 0 < moved < 0.0002
