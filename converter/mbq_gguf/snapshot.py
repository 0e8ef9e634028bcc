"""A model directory that lies in a Hugging Face cache, as models--ORG--NAME/snapshots/COMMIT: which model of the hub it is."""

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
    """One commit of a model on a hub."""

    repo: str  # "ORG/NAME", or "NAME" for the oldest models
    commit: str

    @property
    def name(self) -> str:
        """The model's name, without its organisation."""
        return self.repo.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Its page, on the hub that HF_ENDPOINT names."""
        return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{self.repo}"

    def __str__(self) -> str:
        return f"{self.repo} at commit {self.commit}"


def snapshot_of(model_dir: Path) -> Snapshot | None:
    """What ``model_dir`` is a copy of; None for a directory that lies in no cache of a hub."""
    folder = model_dir.absolute()
    if folder.parent.name != "snapshots":
        return None
    found = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    return Snapshot(found[1].replace("--", "/", 1), folder.name) if found else None


def source_keys(model_dir: Path) -> dict[str, str]:
    """GGUF keys that say where a model of a hub comes from: the repository, and the page of the very commit. None for other directories."""
    snapshot = snapshot_of(model_dir)
    if snapshot is None:
        return {}
    return {"general.source.repo_url": snapshot.url, "general.source.url": f"{snapshot.url}/tree/{snapshot.commit}"}


@contextmanager
def bearing_name(model_dir: Path) -> Iterator[Path]:
    """``model_dir`` under a path that ends in the model's name.

    llama.cpp's conversion reads name, version and size off the directory's name, which in a cache is a commit: there a link with the
    model's own name stands for it during the block.
    """
    snapshot = snapshot_of(model_dir)
    if snapshot is None:
        yield model_dir
        return
    with tempfile.TemporaryDirectory(prefix="mbq-gguf-") as folder:
        link = Path(folder) / snapshot.name
        link.symlink_to(model_dir.absolute(), target_is_directory=True)
        yield link
