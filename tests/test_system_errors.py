"""Full disks and paths that are too long, wherever a command meets them, are sentences."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

import pytest
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.system_errors import system_errors


def test_a_file_that_cannot_be_copied_is_named(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8 << 20))
    with pytest.raises(UserError, match=rf"^no space is left for {disk}/b: free some, or choose another disk"), system_errors():
        shutil.copyfile(tmp_path / "a", disk / "b")


def test_the_temporary_folder_is_named_if_it_is_full(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write does not say where it failed."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(UserError, match=rf"^no space is left in {disk}: "), system_errors(), (disk / "a").open("wb") as file:
        file.write(bytes(8 << 20))


def test_another_full_disk_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full fails every write as a full disk does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MBQ_GGUF_CACHE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^no space is left on a disk that this command writes to: "), system_errors():
        Path("/dev/full").write_bytes(b"some")


def test_no_place_for_temporary_files(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "a").write_bytes(bytes(shutil.disk_usage(disk).free))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(disk)])
    with pytest.raises(UserError, match=r"^no temporary file can be written, .* or set TMPDIR"), system_errors():
        tempfile.gettempdir()


def test_a_full_disk_without_a_place_for_temporary_files_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One disk for everything: where the system does not say which file it was, the temporary folder is looked for, and there is none."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    monkeypatch.setenv("MBQ_GGUF_CACHE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^no space is left on a disk that this command writes to: "), system_errors():
        Path("/dev/full").write_bytes(b"some")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a path is longer than the file system allows: shorten it"), system_errors():
        (tmp_path / ("a" * 300)).touch()


def test_other_errors_stay() -> None:
    with pytest.raises(PermissionError), system_errors():
        raise PermissionError(errno.EACCES, "no")
