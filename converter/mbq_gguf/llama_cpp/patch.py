"""Applies the project's new files and patches to a llama.cpp tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import pin

STAMP = ".mbq-gguf-patch"  # a file in a patched tree with the hash of its patch


def apply_patch(tree: Path, git: Path, folder: Path | None = None) -> None:
    """Copy ``src/`` over `tree` and apply ``patches/*.patch`` in order; does nothing if `tree` already has this version of the patch.

    Raises UserError with the first patch that does not apply and the file at fault; `tree` may then be partially patched and should be
    discarded.
    """
    root = folder or pin.patch_dir()
    wanted, stamp = pin.patch_hash(root), tree / STAMP
    carried = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else None
    if carried == wanted:
        return
    if carried is not None:
        raise UserError(f"{tree} already has another version of the patch: start from an unpatched llama.cpp")
    for path in pin.source_files(root):
        target = tree / path.relative_to(root / "src")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for patch in pin.patch_files(root):
        done = _git_apply(git, tree, patch)
        if done.returncode != 0:
            raise UserError(
                f"the patch {patch.name} does not apply to {_culprit(done.stderr)}: use the pinned llama.cpp, "
                "or adapt the patch to this tree as its header says"
            )
    stamp.write_text(wanted + "\n", encoding="utf-8")


def _git_apply(git: Path, tree: Path, patch: Path) -> subprocess.CompletedProcess[str]:
    # Keep git from using a repository around the tree, or user settings that change white space.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command: list[str | Path] = [git, "apply", "--whitespace=nowarn", patch.resolve()]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def _culprit(said: str) -> str:
    """The file that ``git apply`` complained about, else its own last words."""
    for pattern in (
        r"^error: patch failed: (.+?):\d+$",
        r"^error: (.+?): (?:patch does not apply|No such file or directory|already exists)",
    ):
        found = re.search(pattern, said, re.MULTILINE)
        if found:
            return found[1]
    return f"the tree ({said.strip().splitlines()[-1] if said.strip() else 'git said nothing'})"
