"""The patch on the pinned llama.cpp: it applies, it applies once, it stays small, and its table is correct."""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import pin, source
from mbq_gguf.llama_cpp.patch import apply_patch
from rich.console import Console

# Lines added to or removed from upstream's own files, and how many files that is. What the patch adds lies in files of its own, which a
# move of the pin leaves alone; each of these lines may have to be moved by hand.
LINES_LIMIT, FILES_LIMIT = 300, 54
PATCHES = pin.patch_files()


def changed_lines(patch: Path) -> Counter[str]:
    """Lines added or removed in each upstream file."""
    lines: Counter[str] = Counter()
    file = ""
    for line in patch.read_text().splitlines():
        if found := re.match(r"diff --git a/(\S+) b/", line):
            file = found[1]
        elif file and re.match(r"[+-](?!\+\+ |-- )", line):
            lines[file] += 1
    return lines


ALL_CHANGES = sum((changed_lines(patch) for patch in PATCHES), Counter[str]())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned source, unpacked and patched once."""
    console = Console(file=io.StringIO())
    try:
        archive = source.fetch(pin.read_pin(), console)
    except UserError as error:
        pytest.skip(f"the pinned source is not in the cache and cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("pinned")
    source.unpack(archive, pin.read_pin(), folder)
    before = {file: (folder / file).read_bytes() for file in ALL_CHANGES}
    apply_patch(folder, git())
    unchanged = [file for file in ALL_CHANGES if (folder / file).read_bytes() == before[file]]
    assert not unchanged, "named in a patch but not changed by it"
    return folder


def git() -> Path:
    found = shutil.which("git")
    assert found, "git is needed to apply the patch"
    return Path(found)


def test_new_files_are_there_and_compiled(tree: Path) -> None:
    lists = "".join((tree / file).read_text() for file in ALL_CHANGES if file.endswith("CMakeLists.txt"))
    for file in pin.source_files():
        assert (tree / file.relative_to(pin.patch_dir() / "src")).read_bytes() == file.read_bytes()
        if file.suffix in (".c", ".cpp"):  # CUDA files are found by a glob
            assert re.search(rf"[ /]{re.escape(file.name)}\b", lists), f"{file.name} is in no CMakeLists.txt"


def test_applying_twice_changes_nothing(tree: Path) -> None:
    before = {file: (tree / file).read_bytes() for file in ALL_CHANGES}
    apply_patch(tree, git())
    assert {file: (tree / file).read_bytes() for file in ALL_CHANGES} == before


def test_the_patch_stays_small() -> None:
    assert ALL_CHANGES.total() <= LINES_LIMIT
    assert len(ALL_CHANGES) <= FILES_LIMIT


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_each_patch_says_what_why_and_what_to_check(patch: Path) -> None:
    header = patch.read_text().split("diff --git ", 1)[0]
    assert re.match(r"\S.{20,}", header), "the first line says what the patch does"
    assert "\nWhy: " in header
    assert "\nWhen the pin moves: " in header


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_hunks_carry_the_least_context(patch: Path) -> None:
    for hunk in re.split(r"^@@.*$", patch.read_text(), flags=re.MULTILINE)[1:]:
        lines = re.match(r"\n((?:[ +-].*\n|\n)*)", hunk)
        assert lines is not None
        kinds = [line[:1] or " " for line in lines[1].split("\n")[:-1]]
        changes = [number for number, kind in enumerate(kinds) if kind in "+-"]
        assert changes[0] <= 1, "one line before the change"
        assert len(kinds) - 1 - changes[-1] <= 1, "one line after it"


def test_the_table_in_the_readme_is_complete() -> None:
    rows = re.findall(r"^\| (\S+) \| (\d+) \| \S.* \|$", (pin.patch_dir() / "README.md").read_text(), re.MULTILINE)
    assert {file.replace("\\", ""): int(lines) for file, lines in rows} == dict(ALL_CHANGES)
