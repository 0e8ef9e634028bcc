"""Results of files that an evaluation has finished, on disk, so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mbq_gguf.evaluate.results import FileResult
from mbq_gguf.export.atomic import staged

RESULT = TypeAdapter(FileResult)


@dataclass(frozen=True)
class Finished:
    """Results in ``folder``, or no storage if it is None; ``common`` is what all of them depend on, as JSON values.

    A result's file name is a hash of its inputs, so that another reference, set of questions or version of a file does not match.
    """

    folder: Path | None
    common: Any

    def load(self, file: Path, mmproj: Path) -> FileResult | None:
        """The result of ``file`` with ``mmproj``; None if it is not finished, or damaged."""
        place = self._place(file, mmproj)
        if place is None or not place.is_file():
            return None
        try:
            return RESULT.validate_json(place.read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, file: Path, mmproj: Path, result: FileResult) -> None:
        """Save ``result``. Raises UserError if it cannot be written (a full disk)."""
        place = self._place(file, mmproj)
        if place is None:
            return
        place.parent.mkdir(exist_ok=True)
        with staged(place) as (part,):
            part.write_bytes(RESULT.dump_json(result))

    def _place(self, file: Path, mmproj: Path) -> Path | None:
        if self.folder is None:
            return None
        key = json.dumps([self.common, identity(file), identity(mmproj)])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def identity(path: Path) -> list[str | int]:
    """Identifies a version of a large file without reading it: path, size and modification time."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]
