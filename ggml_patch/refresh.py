"""Write the patch again from a llama.cpp tree: the diffs under patches/ and the new files under src/.

The tree is the pinned source with one commit tagged ``pristine`` and the patch applied on top, edited in place. Each patch keeps its
header and its list of files; a new upstream file is added to a patch by hand first (a line ``diff --git a/PATH b/PATH``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def refresh_patch(patch: Path, tree: Path) -> None:
    """Rewrite ``patch`` below its header with the tree's present changes to the files it names; unless the tree lacks some of them."""
    text = patch.read_text()
    header = text.split("diff --git ", 1)[0]
    files = re.findall(r"^diff --git a/(\S+) b/\1$", text, re.M)
    command = ["git", "-C", str(tree), "diff", "-U1", "--no-color", "--abbrev=10", "pristine", "--", *files]
    body = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    missing = [file for file in files if f"diff --git a/{file} " not in body]
    if missing:
        print(f"left as it is: {patch.name}, since {tree} has no change to {', '.join(missing)}")
    else:
        patch.write_text(header + body)


def main() -> None:
    """Refresh every patch and every new file from the tree named on the command line."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / ".git").exists():
        sys.exit("usage: python ggml_patch/refresh.py TREE (a llama.cpp git tree with the tag `pristine`)")
    tree = Path(sys.argv[1])
    for patch in sorted((HERE / "patches").glob("*.patch")):
        refresh_patch(patch, tree)
    for file in sorted(path for path in (HERE / "src").rglob("*") if path.is_file()):
        source = tree / file.relative_to(HERE / "src")
        if source.exists():
            shutil.copyfile(source, file)
        else:
            print(f"left as it is, not in {tree}: {file.relative_to(HERE)}")


if __name__ == "__main__":
    main()
