"""The cache: paths of downloaded sources and finished builds, and the marker of finished builds.

Layout below the cache root (``MBQ_GGUF_CACHE``, else the user's cache folder)::

    downloads/<package>-<version>/<archive>     source packages, verified by checksum
    builds/<backend>-<key>/                     a patched llama.cpp tree with build/bin in it
    builds/<backend>-<key>/mbq-gguf-build.json  the marker, written last: without it the tree is ignored
    locks/, logs/                               one lock and one log per build
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

MARKER = "mbq-gguf-build.json"


def cache_root() -> Path:
    """The cache folder: ``MBQ_GGUF_CACHE`` if set, else the platform's user cache. Not created here."""
    override = os.environ.get("MBQ_GGUF_CACHE")
    return Path(override).expanduser().absolute() if override else platformdirs.user_cache_path("mbq-gguf")


@dataclass(frozen=True)
class BuildRecord:
    """The contents of a finished build's marker."""

    key: str  # hash of everything that affects the build
    backend: str  # "cpu" or "cuda"
    patch_hash: str  # hash of ggml_patch: patches and new files
    origin: str  # the pin's sha256, or the path given with --source
    machine: str  # machine.machine_hash() of the target CPU
    instruction_set: str  # which of verify.instruction_sets() was verified
    options: tuple[str, ...]  # CMake definitions


def write_record(tree: Path, record: BuildRecord) -> None:
    """Mark `tree` as finished; the marker is written atomically."""
    draft = tree / f".{MARKER}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    os.replace(draft, tree / MARKER)


def read_record(tree: Path) -> BuildRecord | None:
    """The marker of a finished build; None if `tree` is unfinished or was made by another version of this layout."""
    try:
        fields = json.loads((tree / MARKER).read_text(encoding="utf-8"))
        return BuildRecord(**{**fields, "options": tuple(fields["options"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def finished_builds() -> list[tuple[Path, BuildRecord]]:
    """All finished builds in the cache, most recently requested first."""
    found = []
    for marker in (cache_root() / "builds").glob(f"*/{MARKER}"):
        record = read_record(marker.parent)
        if record is not None:
            found.append((marker.stat().st_mtime_ns, marker.parent, record))
    return [(tree, record) for _, tree, record in sorted(found, key=lambda item: item[0], reverse=True)]
