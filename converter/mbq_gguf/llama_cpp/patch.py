"""Put the project's new files and patches on a llama.cpp tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import pin


def apply_patch(tree: Path, git: Path, folder: Path | None = None) -> None:
    """Copy ``src/`` over `tree` and apply ``patches/*.patch`` in order; a tree that has them already is left as it is.

    Raises UserError naming the first patch that does not apply, and the file it stumbles over; `tree` may then be half patched and is
    of no further use.
    """
    root = folder or pin.patch_dir()
    for path in pin.source_files(root):
        target = tree / path.relative_to(root / "src")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    patches = pin.patch_files(root)
    # The whole series undone backwards, tried only: patches of one series may touch the same lines.
    if patches and _git_apply(git, tree, ["--reverse", "--check"], patches[::-1]).returncode == 0:
        return
    for patch in patches:
        done = _git_apply(git, tree, [], [patch])
        if done.returncode != 0:
            raise UserError(
                f"the patch {patch.name} does not apply to {_culprit(done.stderr)}: use the pinned llama.cpp, "
                "or adapt the patch to this tree as its header says"
            )


def _git_apply(git: Path, tree: Path, options: Sequence[str], patches: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    # A git repository around the tree would make git look for the files there, and the user's settings could change white space.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command: list[str | Path] = [git, "apply", "--whitespace=nowarn", *options, *(patch.resolve() for patch in patches)]
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
