"""llama-quantize supports the MBQ targets: the type of each tensor, and the number in the file."""

from __future__ import annotations

import subprocess
from io import StringIO
from pathlib import Path

import pytest
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.llama_cpp.paths import find_program
from rich.console import Console


@pytest.fixture(scope="module")
def bf16(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "bf16.gguf"
    convert(ConvertOptions(tiny_dir, path, type="BF16"), Console(file=StringIO()))
    return path


@pytest.mark.parametrize(("target", "number"), [("MBQ3", 120), ("MBQ3_64", 121), ("MBQ3S", 122), ("MBQ3S_64", 123)])
def test_types_of_a_target(bf16: Path, tmp_path: Path, target: str, number: int) -> None:
    out = tmp_path / "out.gguf"
    subprocess.run([find_program("llama-quantize"), bf16, out, target, "2"], check=True, capture_output=True, timeout=120)
    header = read_header(out)
    kinds = {entry.name: entry.type_name for entry in header.tensors}
    assert header.metadata["general.file_type"] == number
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.2.ffn_gate.weight"] == target
    assert kinds["blk.1.ffn_down.weight"] == f"{target.removesuffix('_64')}_64"  # rows of 192


@pytest.mark.parametrize(("target", "kept"), [("Q4_0", False), ("COPY", True)])
def test_scales_made_anew_are_no_longer_one_a_row(target: str, kept: bool, built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "w4a8.gguf", tmp_path / "out.gguf"
    convert(ConvertOptions(tiny_dir, given, type="W4A8", method="rtn", rounding="nearest"), Console(file=StringIO()))
    command = [find_program("llama-quantize"), "--allow-requantize", given, out, target, "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    keys = {"mbq.row_scale", "mbq.row_scale.version"}
    assert keys <= read_header(given).metadata.keys()
    assert keys & read_header(out).metadata.keys() == (keys if kept else set())
