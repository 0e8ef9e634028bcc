"""Output files are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.atomic import check_output, check_space, staged


def test_files_appear_together(tmp_path: Path) -> None:
    finals = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    with staged(*finals) as parts:
        for part in parts:
            part.write_bytes(b"whole")
            assert not any(final.exists() for final in finals)
    assert [final.read_bytes() for final in finals] == [b"whole", b"whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def fail_half_way(final: Path, failure: BaseException) -> None:
    """Stage ``final`` and end with ``failure`` after some bytes."""
    with staged(final) as (part,):
        part.write_bytes(b"half")
        raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("no"), ValueError("no")], ids=lambda error: type(error).__name__)
def test_failure_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    final = tmp_path / "a.gguf"
    final.write_bytes(b"old")
    with pytest.raises(type(failure)):
        fail_half_way(final, failure)
    assert final.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_full_disk_is_said(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        fail_half_way(tmp_path / "a.gguf", OSError(number, "system's words"))
    assert not list(tmp_path.iterdir())


def test_real_full_device_is_said(tmp_path: Path) -> None:
    """/dev/full fails every write as a full disk does."""

    def write() -> None:
        with staged(tmp_path / "a.gguf") as (part,):
            part.symlink_to("/dev/full")
            part.write_bytes(b"some bytes")

    with pytest.raises(UserError, match="the disk is full"):
        write()
    assert not list(tmp_path.iterdir())


def test_file_that_was_never_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*a\.gguf"), staged(tmp_path / "a.gguf"):
        pass


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    check_space(tmp_path, 0)
    with pytest.raises(UserError, match="MB are needed"):
        check_space(tmp_path, 1 << 60)


def test_places_that_take_no_file_are_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "a.gguf")
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        check_output(tmp_path / "missing" / "a.gguf")
    with pytest.raises(UsageError, match="cannot write in /proc"):
        check_output(Path("/proc/a.gguf"))
