"""Output files are complete or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.atomic import check_gguf_output, check_output, check_space, claimed, hidden, staged
from mbq_gguf.workdir import TEMPORARY, open_workdir


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
            part.unlink()
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


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/null"), os.mkfifo], ids=["device", "pipe"])
def test_devices_and_pipes_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    make(path)
    with pytest.raises(UsageError, match="is a device or a pipe"):
        check_output(path)


@pytest.mark.parametrize("name", ["out.gguf", "linked.gguf"])
def test_what_is_no_gguf_file_is_not_replaced(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    if name == "linked.gguf":
        out.symlink_to(tmp_path / "target")
    check_gguf_output(out)
    for content in (b"", b"GGUF", b"GGUF and more"):
        out.write_bytes(content)
        check_gguf_output(out)
    for content in (b"{", b'{"a": 1}', b"GGML"):
        out.write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} exists and is not a GGUF file: move it away"):
            check_gguf_output(out)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for name in ("old", "new"):  # new points to nothing yet
        (tmp_path / f"{name}.gguf").symlink_to(Path("store") / f"{name}.gguf")
    (tmp_path / "store" / "old.gguf").write_bytes(b"old")
    finals = [tmp_path / "old.gguf", tmp_path / "new.gguf"]
    with staged(*finals) as parts:
        for part in parts:
            assert part.parent == tmp_path / "store"
            part.write_bytes(b"whole")
    for final in finals:
        assert final.is_symlink()
        assert (tmp_path / "store" / final.name).read_bytes() == b"whole"


def test_new_files_have_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with staged(tmp_path / "a.gguf") as (part,):
        part.write_bytes(b"whole")
    assert (tmp_path / "a.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_parts_of_two_runs_differ(tmp_path: Path) -> None:
    final = tmp_path / "a.gguf"
    with staged(final) as (first,), staged(final) as (second,):
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert final.read_bytes() == b"first"  # it ended last


CLAIM = "import sys, time; from pathlib import Path; from mbq_gguf.export.atomic import claimed\n"
HOLD = CLAIM + "with claimed(*map(Path, sys.argv[1:])): print(flush=True); time.sleep(60)"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Another process holds the claim; a link to the same file is no way around it, and death, however sudden, frees it."""
    final, link = tmp_path / "a.gguf", tmp_path / "link.gguf"
    link.symlink_to(final)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(final)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for path in (final, link):
            with pytest.raises(UsageError, match="another mbq-gguf is writing"), claimed(tmp_path / "b.gguf", path):
                pass
        with claimed(tmp_path / "c.gguf"):
            pass
        other.kill()
    with claimed(final):
        pass
    assert list(tmp_path.iterdir()) == [link]


RACE = (
    CLAIM
    + """
from mbq_gguf.errors import UserError
inside = Path(sys.argv[2])
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        with claimed(Path(sys.argv[1])):
            inside.mkdir()  # fails where another process is here too
            inside.rmdir()
            print("in")
    except UserError:
        pass
"""
)


def test_claims_never_overlap(tmp_path: Path) -> None:
    """Four processes take and leave the claim as fast as they can: the moment in which the lock file is removed is met."""
    command = [sys.executable, "-c", RACE, str(tmp_path / "a.gguf"), str(tmp_path / "inside")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, ends
    assert sum(output.count("in") for output, _ in ends) > 50
    assert not list(tmp_path.iterdir())


def test_a_claim_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    final = tmp_path / "a.gguf"
    with staged(final) as (part,):
        left = part.with_name(part.name.replace(".part", "0.part"))
        left.write_bytes(b"half")
        part.write_bytes(b"whole")
    with claimed(final):
        assert not left.exists()
    with claimed(tmp_path / "b.gguf"):
        pass
    assert list(tmp_path.iterdir()) == [final]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """The name of a lock can be foreseen, that of a part cannot."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    final = tmp_path / "a.gguf"
    (tmp_path / f"{hidden(final)}.lock").symlink_to(precious)
    with pytest.raises(UsageError, match="cannot write in"), claimed(final):
        pass
    assert precious.read_bytes() == b"precious"


def test_a_link_planted_at_a_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the name is known: neither a part, nor a lock, nor an item of a work directory writes through it."""
    victim, final = tmp_path / "victim", tmp_path / "a.gguf"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / f"{hidden(final)}-{'0' * 16}.part").symlink_to(victim)
    with pytest.raises(UserError, match="cannot write"), staged(final) as (part,):
        part.write_text("theirs")
    (tmp_path / f"{hidden(final)}.lock").symlink_to(victim)
    with pytest.raises(UsageError, match="cannot write"), claimed(final):
        pass
    work = open_workdir(tmp_path / "work", {"model": "a"})
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: iter(("known", "other")))
    (work.path / f"{TEMPORARY}known").symlink_to(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    work.save("item", {}, None)
    assert work.load("item")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert victim.read_text() == "mine"
    assert not final.exists()
