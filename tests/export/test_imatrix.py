"""The importance matrix's file, and its use by llama-quantize."""

from __future__ import annotations

import subprocess
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_cbind import types
from mbq_gguf.calibration.importance import Importance
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.imatrix import gguf_names, write_imatrix
from mbq_gguf.imatrix import make_imatrix
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.models.layouts import STANDARD
from rich.console import Console

LAYERS = 3


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Bytes of every tensor [rows, row bytes]."""
    header, content = read_header(path), np.fromfile(path, np.uint8)
    matrices = [entry for entry in header.tensors if len(entry.shape) == 2]
    return {m.name: content[header.data_start + m.offset :][: m.nbytes].reshape(m.shape[1], -1) for m in matrices}


@pytest.fixture(scope="module")
def files(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imatrix.gguf of the tiny VLM, its BF16 file, and what llama-quantize makes of both; log.txt is what that says."""
    folder = tmp_path_factory.mktemp("imatrix")
    console = Console(file=StringIO())
    sentence = make_imatrix(tiny_dir, folder / "imatrix.gguf", None, 3, 0, "cpu", console)
    assert sentence.startswith(f"importance of {7 * LAYERS} tensors on 3 pictures")
    convert(ConvertOptions(tiny_dir, folder / "bf16.gguf", type="BF16"), console)
    command = [str(find_program("llama-quantize")), "--imatrix", "imatrix.gguf", "bf16.gguf", "q4_0.gguf", "Q4_0", "2"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120, check=True)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return folder


def test_llama_quantize_uses_it_for_every_layer_tensor(files: Path) -> None:
    log = (files / "log.txt").read_text()
    assert f"have {7 * LAYERS} importance matrix entries" in log
    missing = [line for line in log.splitlines() if "did not find weights for" in line]
    assert all("blk." not in line for line in missing), missing


def test_llama_quantize_divides_the_sums_by_the_tokens(files: Path) -> None:
    entries, original, quantised = (tensors(files / f"{name}.gguf") for name in ("imatrix", "bf16", "q4_0"))
    for name in ("blk.0.attn_q.weight", "blk.1.attn_output.weight", "blk.2.ffn_down.weight"):
        sums, counts = (entries[f"{name}.{end}"].view(np.float32)[0] for end in ("in_sum2", "counts"))
        mean = sums / counts
        weights = (original[name].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(quantised[name], types.quantize("Q4_0", weights, mean))
        assert not np.array_equal(quantised[name], types.quantize("Q4_0", weights))


def test_values_are_those_that_were_given(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    keys = [f"layers.{i}.{name}.weight" for i in range(LAYERS) for name in STANDARD.readers]
    sums = {key: torch.rand(192 if "down" in key else 128).double() for key in keys}
    names = write_imatrix(tiny_dir, tmp_path / "imatrix.gguf", Importance(sums, 1000, 4), "pictures")
    entries = tensors(tmp_path / "imatrix.gguf")
    assert len(entries) == 2 * len(names) == 2 * len(sums)
    given = sums["layers.1.mlp.down_proj.weight"].float().numpy()
    np.testing.assert_array_equal(entries["blk.1.ffn_down.weight.in_sum2"].view(np.float32), [given])
    np.testing.assert_array_equal(entries["blk.1.ffn_down.weight.counts"].view(np.float32), [[1000.0]])
    metadata = read_header(tmp_path / "imatrix.gguf").metadata
    found = [metadata[f"imatrix.{name}"] for name in ("datasets", "chunk_count", "chunk_size")]
    assert found == [["pictures"], 4, 250]


def test_a_tensor_that_the_file_will_not_have_is_refused(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leaves out layers\.9"):
        write_imatrix(tiny_dir, tmp_path / "imatrix.gguf", Importance({"layers.9.mlp.up_proj.weight": torch.ones(128)}, 1, 1), "")
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_model_whose_rows_are_reordered(built_llama: Path, llama_dir: Path) -> None:
    names = gguf_names(llama_dir)
    assert names["layers.1.self_attn.q_proj.weight"] == ["blk.1.attn_q.weight"]
