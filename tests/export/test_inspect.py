"""inspect on valid files, on files of other kinds, and on damaged ones."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import add_metadata
from mbq_gguf.export.inspect import inspect, ranges, sparkline
from mbq_gguf.export.metadata import KNOWN_VERSIONS, describe
from mbq_gguf.formats import row_scale, static_ranges
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.mbq3 import MBQ3
from mbq_gguf.model_card import write_card
from rich.console import Console

LAYERS = 12


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a few kilobytes with everything that inspect shows."""
    gguf = import_gguf()
    path = tmp_path_factory.mktemp("inspect") / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen2vl")
    ratios = {"attention": [1.0 + layer for layer in range(LAYERS)], "mlp": [0.5] * LAYERS}
    keys = describe(
        type_name="MBQ3",
        method="mbq",
        rounding="gptq",
        fingerprint="ab" * 32,
        samples=7,
        synthetic=4,
        ratios=ratios,
        token_weights="uniform",
    )
    for key, value in keys.items():
        add_metadata(writer, key, value)
    writer.add_string("markup", "[/red] not [bold]markup, no \x1b[2J command")
    writer.add_array("tokenizer.ggml.tokens", [f"<{number}>" for number in range(50)])
    weights = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", MBQ3.quantize(weights), raw_dtype=gguf.GGMLQuantizationType.MBQ3)
    writer.add_tensor("output_norm.weight", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shown(path: Path, width: int = 140) -> str:
    """What a user sees of ``path``."""
    console = Console(file=StringIO(), width=width)
    console.print(inspect(path))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_is_shown(small_file: Path) -> None:
    lines = [" ".join(line.split()) for line in shown(small_file).splitlines()]
    for expected in (
        "mbq.version 1",
        "mbq.type MBQ3",
        "mbq.method mbq",
        "mbq.rounding gptq",
        "mbq.calibration.samples 7",
        "markup [/red] not [bold]markup, no [2J command",
        "attention ▁▂▂▃▄▄▅▆▆▇██ 1 7 12",
        "mlp ████████████ 0.5 0.5 0.5",
        "blk.*.attn_q.weight 0-11 MBQ3 2 × 256 3.250",
        "output_norm.weight F32 256 32.000",
        "MBQ3 12 6,144 0.00 3.250",
        "all 13 6,400 0.00 4.400",
    ):
        assert expected in lines
    assert "tokenizer.ggml.tokens [<0>, <1>, <2>, <3>, <4>, <5>, <6>, <7>, … 50 in all]" in lines


def test_a_version_that_is_not_known_yet_is_told(tmp_path: Path) -> None:
    """By inspect and by the card, of a vision file as well."""
    assert KNOWN_VERSIONS == {"mbq.row_scale.version": row_scale.VERSION, "mbq.act.version": static_ranges.VERSION}
    for name, versions in {
        "out.gguf": {"mbq.act.version": 2},
        "mmproj-out.gguf": {"mbq.act.version": 1, "mbq.row_scale.version": "|2"},
    }.items():
        writer = import_gguf().GGUFWriter(str(tmp_path / name), "qwen2vl")
        for key, value in versions.items():
            add_metadata(writer, key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert "mbq.act.version is 2, and the llama.cpp of this mbq-gguf knows 1: it will not load the file" in shown(tmp_path / "out.gguf")
    vision = shown(tmp_path / "mmproj-out.gguf")
    assert "mbq.row_scale.version is |2, and" in vision
    assert "mbq.act.version is" not in vision
    card = write_card(tmp_path / "out.gguf").read_text()
    assert "\n\nout.gguf: mbq.act.version is 2, and the llama.cpp of this mbq-gguf knows 1: it will not load the file" in card
    assert "\n\nmmproj-out.gguf: mbq.row_scale.version is \\|2, and" in card


@pytest.mark.parametrize(
    ("architecture", "keys", "said"),
    [
        ("qwen2vl", {"mbq.act.version": 1, "mbq.act.range.qkv.text": [2.0], "mbq.act.range.down.vision": [2.0]}, ""),
        ("qwen2vl", {"mbq.act.version": 1, "mbq.act.range.qkv.text": [2.0], "mbq.act.range.delta.text": [2.0]}, "mbq.act.range.delta.text"),
        ("qwen2vl", {"mbq.act.range.qkv.text": [2.0]}, "mbq.act.range.qkv.text"),  # without the version
        ("clip", {"mbq.act.version": 1, "mbq.act.range.qkv.text": [2.0], "mbq.act.range.o.vision": [2.0]}, "mbq.act.range.qkv.text"),
    ],
)
def test_ranges_that_no_program_reads_are_told(architecture: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    writer = import_gguf().GGUFWriter(str(tmp_path / "out.gguf"), architecture)
    for key, value in keys.items():
        add_metadata(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    sentence = "ranges that no program reads, so these activations are quantised dynamically: "
    assert (f"{sentence}{said}\n" in shown(tmp_path / "out.gguf").replace(" \n", "\n")) == bool(said)
    assert (sentence in shown(tmp_path / "out.gguf")) == bool(said)


def test_header_agrees_with_ggufs_own_reader(small_file: Path) -> None:
    header, reader = read_header(small_file), import_gguf().GGUFReader(str(small_file))
    assert [(t.name, t.shape, t.type_name, t.nbytes, header.data_start + t.offset) for t in header.tensors] == [
        (t.name, tuple(int(size) for size in t.shape), t.tensor_type.name, int(t.n_bytes), int(t.data_offset)) for t in reader.tensors
    ]
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == theirs


def test_keys_are_whole_in_a_narrow_terminal(small_file: Path) -> None:
    words = [line.split() for line in shown(small_file, width=40).splitlines()]
    assert ["mbq.calibration.s", "7"] in words
    assert ["amples"] in words


def test_long_arrays_are_cut(small_file: Path) -> None:
    header = read_header(small_file, longest_array=5)
    assert header.metadata["tokenizer.ggml.tokens"] == ["<0>", "<1>", "<2>", "<3>", "<4>"]
    assert header.lengths["tokenizer.ggml.tokens"] == 50


@pytest.mark.parametrize("content", [b"", b"GG", b"not a GGUF file at all", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a GGUF file"):
        inspect(path)


def test_unreadable_paths_are_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(UserError, match="cannot read"):
            inspect(path)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_truncation_is_told(small_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = small_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: data.draw(st.integers(4, len(content) - 32))])  # up to 31 bytes of padding may go unmissed
    with pytest.raises(UserError, match="is damaged or incomplete"):
        inspect(path)


@given(flips=st.lists(st.tuples(st.integers(4, 2500), st.integers(0, 255)), min_size=1, max_size=8))
@example(flips=[(8 + byte, 255) for byte in range(8)])  # 2^64 - 1 tensors
@example(flips=[(16 + byte, 255) for byte in range(8)])  # 2^64 - 1 keys
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_are_shown_or_told(small_file: Path, tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """No damage gives anything but a table or one sentence."""
    content = bytearray(small_file.read_bytes())
    for place, value in flips:
        content[place] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    try:
        text = shown(path)
    except UserError as error:
        text = f"one sentence: {error}"
    assert len(text.splitlines()) == 1 or "totals" in text


def test_sparkline_spans_zero_to_the_greatest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([math.nan, -1.0, 2.0, math.inf]) == "··█·"
    assert sparkline([0.0, 0.0]) == "▁▁"


def test_ranges_are_short() -> None:
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"
    assert ranges([]) == ""
