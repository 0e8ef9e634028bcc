"""Text and mmproj files against those that llama.cpp's own converter makes from the same checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.export.picture_size import LEAST, MOST
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type
from safetensors.torch import load_file, save_file

PLAIN = {"quantised": {}, "replaced": {}, "base_type": "BF16", "embedding_type": "BF16", "metadata": {}, "file_type": None}
LINEARS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")


def decoder(folder: Path) -> dict[str, torch.Tensor]:
    """The decoder's tensors of a checkpoint by decoder key."""
    tensors = load_file(folder / "model.safetensors")
    prefix = "language_model.model." if any(name.startswith("language_model.") for name in tensors) else "model."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def upstream(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by the tree's convert_hf_to_gguf.py, run as a user runs it."""
    folder = tmp_path_factory.mktemp("upstream")
    files = {}
    for name, arguments in {"text": ["--outtype", "bf16"], "mmproj": ["--outtype", "f16", "--mmproj"]}.items():
        files[name] = folder / f"{name}.gguf"
        command = [sys.executable, str(built_llama / "convert_hf_to_gguf.py"), str(tiny_dir), "--outfile", str(files[name]), *arguments]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return files


def test_reference_file_is_upstreams_byte_for_byte(upstream: dict[str, Path], tiny_dir: Path, tmp_path: Path) -> None:
    write_text_gguf(tiny_dir, tmp_path / "out.gguf", **PLAIN)
    assert (tmp_path / "out.gguf").read_bytes() == upstream["text"].read_bytes()


def test_mmproj_is_upstreams_and_the_limits_of_a_picture(upstream: dict[str, Path], tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    write_mmproj_gguf(tiny_dir, out, mmproj_type="F16")
    ours, theirs = read_header(out), read_header(upstream["mmproj"])
    assert ours.metadata == {**theirs.metadata, LEAST: 50176, MOST: 50176}  # the tiny VLM has the reference VLM's processor
    assert ours.tensors == theirs.tensors
    assert out.read_bytes()[ours.data_start :] == upstream["mmproj"].read_bytes()[theirs.data_start :]


@pytest.mark.parametrize("model", ["tiny_dir", "llama_dir"])
def test_packed_rows_land_where_conversion_puts_them(model: str, built_llama: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Linears quantised as the checkpoint's own bfloat16 must give the plain file: Llama's q and k rows are reordered on the way."""
    folder = request.getfixturevalue(model)
    quantised = {
        key: QuantisedTensor("BF16", weight.view(torch.uint8).numpy(), weight.shape[1])
        for key, weight in decoder(folder).items()
        if key.endswith(LINEARS)
    }
    write_text_gguf(folder, tmp_path / "plain.gguf", **PLAIN)
    write_text_gguf(folder, tmp_path / "quantised.gguf", **{**PLAIN, "quantised": quantised})
    assert (tmp_path / "quantised.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize("model", ["tiny_dir", "llama_dir"])
def test_replaced_tensors_are_as_if_the_checkpoint_held_them(
    model: str, built_llama: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(model)
    keys = [key for key in decoder(folder) if key.startswith("layers.1.") or key == "norm.weight"]
    torch.manual_seed(0)
    replaced = {key: torch.randn_like(decoder(folder)[key]) for key in keys}
    changed = tmp_path / folder.name  # the name of the folder becomes the name of the model in the file
    shutil.copytree(folder, changed)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: replaced[key] for name in tensors for key in keys if name.endswith("model." + key)}
    save_file(tensors, changed / "model.safetensors")
    write_text_gguf(folder, tmp_path / "replaced.gguf", **{**PLAIN, "replaced": replaced})
    write_text_gguf(changed, tmp_path / "changed.gguf", **PLAIN)
    assert (tmp_path / "replaced.gguf").read_bytes() == (tmp_path / "changed.gguf").read_bytes()


def test_replaced_norm_keeps_float32(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    norm = torch.linspace(0.1, 1.7, 128)  # no bfloat16 numbers
    write_text_gguf(tiny_dir, tmp_path / "out.gguf", **{**PLAIN, "replaced": {"layers.0.input_layernorm.weight": norm}})
    assert read_tensor(tmp_path / "out.gguf", "blk.0.attn_norm.weight") == norm.numpy().tobytes()


def read_tensor(path: Path, name: str) -> bytes:
    """A tensor's stored bytes."""
    header = read_header(path)
    entry = next(tensor for tensor in header.tensors if tensor.name == name)
    return path.read_bytes()[header.data_start + entry.offset :][: entry.nbytes]


def test_mbq3_file_holds_the_bytes_and_its_type(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    weight = decoder(tiny_dir)["layers.2.self_attn.o_proj.weight"].float().numpy()
    data = quant_type("MBQ3").quantize(weight)
    content = {**PLAIN, "quantised": {"layers.2.self_attn.o_proj.weight": QuantisedTensor("MBQ3", data, 128)}, "file_type": 120}
    records = write_text_gguf(tiny_dir, tmp_path / "out.gguf", **content)
    header = read_header(tmp_path / "out.gguf")
    assert header.metadata["general.file_type"] == 120
    entry = next(tensor for tensor in header.tensors if tensor.name == "blk.2.attn_output.weight")
    assert (entry.type_name, entry.shape, entry.nbytes) == ("MBQ3", (128, 128), 128 * 52)
    assert read_tensor(tmp_path / "out.gguf", entry.name) == data.tobytes()
    assert [(r.name, r.type_name, r.nbytes) for r in records] == [(t.name, t.type_name, t.nbytes) for t in header.tensors]


@pytest.mark.parametrize(("wanted", "stored"), [("Q6_K", "Q8_0"), ("MBQ3", "MBQ3")])
def test_embeddings_take_their_type_or_its_fallback(wanted: str, stored: str, built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """128 columns are not a multiple of the 256 that a K-quant's block holds."""
    records = write_text_gguf(tiny_dir, tmp_path / "out.gguf", **{**PLAIN, "embedding_type": wanted})
    record = next(record for record in records if record.name == "token_embd.weight")
    assert (record.type_name, record.wanted) == (stored, None if wanted == stored else wanted)
    weight = decoder(tiny_dir)["embed_tokens.weight"].float().numpy()
    assert read_tensor(tmp_path / "out.gguf", "token_embd.weight") == quant_type(stored).quantize(weight).tobytes()


def test_metadata_keeps_its_types(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    metadata = {"mbq.a": 3, "mbq.b": -3, "mbq.c": 0.5, "mbq.d": True, "mbq.e": "text", "mbq.f": [0.5, 0.25], "mbq.g": []}
    write_text_gguf(tiny_dir, tmp_path / "out.gguf", **{**PLAIN, "metadata": metadata})
    found = read_header(tmp_path / "out.gguf").metadata
    assert {key: value for key, value in found.items() if key.startswith("mbq.")} == {k: v for k, v in metadata.items() if v != []}
    assert type(found["mbq.d"]) is bool


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"replaced": {"layers.9.input_layernorm.weight": torch.ones(128)}}, "has no tensor layers.9.input_layernorm.weight"),
        ({"replaced": {"layers.0.input_layernorm.weight": torch.ones(64)}}, r"is \(128,\) in the checkpoint and \(64,\)"),
        (
            {"quantised": {"layers.0.mlp.up_proj.weight": QuantisedTensor("MBQ3", np.zeros((4, 52), np.uint8), 128)}},
            r"is \(192, 128\) in the checkpoint and \(4, 128\)",
        ),
    ],
    ids=["unknown", "wrong shape", "wrong rows"],
)
def test_tensors_that_do_not_belong_are_refused(
    content: dict[str, object], sentence: str, built_llama: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        write_text_gguf(tiny_dir, tmp_path / "out.gguf", **{**PLAIN, **content})
    assert not list(tmp_path.iterdir())
