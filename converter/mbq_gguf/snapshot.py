"""Identifies the hub model of a directory in a Hugging Face cache (models--ORG--NAME/snapshots/COMMIT)."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a model on the hub."""

    repo: str  # "ORG/NAME", or "NAME" for the oldest models
    commit: str

    @property
    def name(self) -> str:
        """The model's name, without its organisation."""
        return self.repo.rpartition("/")[2]

    @property
    def url(self) -> str:
        """The model's page on the hub (HF_ENDPOINT)."""
        return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{self.repo}"

    def __str__(self) -> str:
        return f"{self.repo} at commit {self.commit}"


def snapshot_of(model_dir: Path) -> Snapshot | None:
    """The snapshot that ``model_dir`` is a copy of; None for a directory outside of a hub cache."""
    folder = model_dir.absolute()
    if folder.parent.name != "snapshots":
        return None
    found = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    return Snapshot(found[1].replace("--", "/", 1), folder.name) if found else None


def source_keys(model_dir: Path) -> dict[str, str]:
    """GGUF keys for the origin of a hub model: the repository, and the page of the commit. Empty for other directories."""
    snapshot = snapshot_of(model_dir)
    if snapshot is None:
        return {}
    return {"general.source.repo_url": snapshot.url, "general.source.url": f"{snapshot.url}/tree/{snapshot.commit}"}


@contextmanager
def named_link(model_dir: Path) -> Iterator[Path]:
    """``model_dir`` under a path that ends in the model's name.

    llama.cpp's conversion takes name, version and size from the directory's name, which is a commit hash in a cache. For the block, a
    symlink with the model's name is used instead.
    """
    snapshot = snapshot_of(model_dir)
    if snapshot is None:
        yield model_dir
        return
    with tempfile.TemporaryDirectory(prefix="mbq-gguf-") as folder:
        link = Path(folder) / snapshot.name
        link.symlink_to(model_dir.absolute(), target_is_directory=True)
        yield link
