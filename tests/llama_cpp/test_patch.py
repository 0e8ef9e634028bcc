"""Patching a tree: order, repetition, inside another repository, and a patch that does not apply."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.patch import apply_patch
from mbq_gguf.llama_cpp.source import tree_hash
from workshop_tree import KERNEL, Workshop

GIT = Path(shutil.which("git") or "git")
SECOND = """On top of the first.
--- a/kernel.c
+++ b/kernel.c
@@ -1,4 +1,4 @@
 #include "mbq-answer.h"
 int kernel(void) {
-    return MBQ_ANSWER;
+    return MBQ_ANSWER + 0;
 }
"""


def test_patches_apply_in_order_and_once(workshop: Workshop) -> None:
    (workshop.patch / "patches" / "0002-more.patch").write_text(SECOND)
    apply_patch(workshop.tree, GIT)
    assert "MBQ_ANSWER + 0" in (workshop.tree / "kernel.c").read_text()
    assert (workshop.tree / "mbq-answer.h").is_file()
    before = tree_hash(workshop.tree)
    apply_patch(workshop.tree, GIT)
    assert tree_hash(workshop.tree) == before
    (workshop.patch / "src" / "mbq-answer.h").write_text("#define MBQ_ANSWER 41\n")
    with pytest.raises(UserError, match="already has another version of the patch"):
        apply_patch(workshop.tree, GIT)


def test_a_repository_around_the_tree_does_not_matter(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([GIT, "init", "-q", workshop.root], check=True)
    monkeypatch.setenv("GIT_DIR", str(workshop.root / ".git"))
    apply_patch(workshop.tree, GIT)
    assert "MBQ_ANSWER" in (workshop.tree / "kernel.c").read_text()


@pytest.mark.parametrize("content", [KERNEL.replace("7", "8"), None])
def test_a_patch_that_does_not_apply_is_named_with_its_file(workshop: Workshop, content: str | None) -> None:
    kernel = workshop.tree / "kernel.c"
    kernel.unlink() if content is None else kernel.write_text(content)
    with pytest.raises(UserError, match=r"^the patch 0001-answer\.patch does not apply to kernel\.c: "):
        apply_patch(workshop.tree, GIT)
