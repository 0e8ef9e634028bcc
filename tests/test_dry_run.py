"""``convert --dry-run``: the sizes of the very files, what fails early, and nothing written."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.dry_run import dry_run, expected_seconds
from mbq_gguf.errors import UserError
from rich.console import Console

NEAREST = {"method": "rtn", "rounding": "nearest"}
GPTQ = {"samples": 2, "synthetic": 0}


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "BF16"},
        {**NEAREST, "type": "MBQ3S", "mmproj_type": "Q8_0"},
        {**NEAREST, "type": "W4A8", "embedding_type": "F16", "mmproj_type": "W4A8"},
        {**NEAREST, "type": "Q4_0", "rotate": "full"},
        {**GPTQ, "method": "awq", "target_bpw": 4.5},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_expected_sizes_are_the_files(settings: dict[str, Any], built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", **settings)
    console = Console(file=StringIO(), width=140)
    expected = dry_run(options, console)
    assert list(tmp_path.iterdir()) == []
    report = convert(options, console)
    for size, path in ((expected.text_bytes, report.out), (expected.mmproj_bytes, report.mmproj)):
        assert size == pytest.approx(path.stat().st_size, rel=0.01), path.name
    if "target_bpw" not in settings:
        types = [
            [(record.name, record.type_name, record.nbytes) for record in records] for records in (report.tensors, expected.report.tensors)
        ]
        assert types[0] == types[1]


def test_it_tells_files_memory_and_time(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=140)
    console.print(dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", **GPTQ), console).render())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("MBQ3S_64", "mmproj-out.gguf", "of memory and", "nothing was written"):
        assert part in said


def test_a_bad_calibration_set_is_found(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "nowhere.png", "turns": [{"question": "What?", "answer": "A box."}]}\n')
    with pytest.raises(UserError, match=r"nowhere\.png"):
        dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", calib=bad), Console(file=StringIO()))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="has no image in it"):
        dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", calib=tmp_path / "folder"), Console(file=StringIO()))


def test_time_grows_with_samples_weights_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbq_gguf.dry_run.measure_rate", lambda device: 48e9)
    plain = ConvertOptions(tmp_path, tmp_path / "out.gguf")
    searched = ConvertOptions(tmp_path, tmp_path / "out.gguf", method="mbq")
    assert expected_seconds(plain, 106_000_000, 96) == pytest.approx(752, rel=0.01)  # what machine B took (docs/log.md)
    assert expected_seconds(plain, 212_000_000, 96) == pytest.approx(2 * 752, rel=0.01)
    assert expected_seconds(searched, 106_000_000, 96) > 3 * expected_seconds(plain, 106_000_000, 32)
