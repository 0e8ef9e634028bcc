"""Disk space is checked before the work, for every part and once for each file system."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_writer import SPARE_BYTES
from mbq_gguf.export.space import Need, check_room
from mbq_gguf.models.checks import weight_files
from mbq_gguf.preflight import check_inputs, space_needs
from rich.console import Console

MB = 1 << 20


def test_parts_on_one_disk_are_added(disk: Path, tmp_path: Path) -> None:
    three, elsewhere = Need(disk / "not" / "there", "finished layers", 3 * MB), Need(tmp_path, "model.gguf", 3 * MB)
    check_room([three, elsewhere])
    with pytest.raises(UserError, match=r"disk has 4\.2 MB free and 6\.3 MB are needed \(finished layers 3\.1 MB, model\.gguf 3\.1 MB\)"):
        check_room([three, Need(disk, "model.gguf", 3 * MB)])


@pytest.mark.usefixtures("built_llama")
def test_each_place_is_looked_at(disk: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """OUT through a link, and the work directory: the tiny model takes 7 MB of embeddings, 0.6 MB of layers in BF16."""
    (tmp_path / "linked.gguf").symlink_to(disk / "real.gguf")
    with pytest.raises(UserError, match=r"disk has 4\.2 MB free .*linked\.gguf"):
        check_inputs(ConvertOptions(tiny_dir, tmp_path / "linked.gguf"))
    (disk / "full").write_bytes(bytes(4 * MB - 65536))
    with pytest.raises(UserError, match=r"disk has 0\.1 MB free .*\(finished layers"):
        check_inputs(ConvertOptions(tiny_dir, tmp_path / "model.gguf", work_dir=disk / "work"))
    assert {path.name for path in disk.iterdir()} == {"full"}


@pytest.mark.usefixtures("built_llama")
def test_what_the_writer_asks_for_is_asked_for_before_the_work(tiny_dir: Path, tmp_path: Path) -> None:
    """It wants 64 MiB beside the tensors, for header, vocabulary and the file system."""
    options = ConvertOptions(tiny_dir, tmp_path / "model.gguf")
    assert sum(need.size for need in space_needs(options, weight_files(tiny_dir)) if need.folder == tmp_path) > SPARE_BYTES + 6.5e6


@pytest.mark.usefixtures("built_llama")
def test_what_is_predicted_is_written(tiny_dir: Path, tmp_path: Path) -> None:
    """The mmproj within 1 %, the text file less its vocabulary (2 MB) and padding."""
    options = ConvertOptions(tiny_dir, tmp_path / "model.gguf", type="BF16")
    text, _, mmproj = space_needs(options, weight_files(tiny_dir))
    report = convert(options, Console(file=StringIO()))
    for need, records, tolerance in ((text, report.tensors, 0.01), (mmproj, report.mmproj_tensors, 0.01)):
        assert need.size == pytest.approx(sum(record.nbytes for record in records), rel=tolerance)
