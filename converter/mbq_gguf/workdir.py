"""Finished work on disk, so that a stopped run goes on where it was.

A work directory belongs to one fingerprint of model, data and settings. Every item is one safetensors file with its JSON in the header,
written under a temporary name and renamed when whole, so a run that is killed leaves only whole items.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mbq_gguf.errors import UsageError, UserError

FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class WorkDir:
    """An open work directory; see :func:`open_workdir`."""

    path: Path

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Tensors and JSON data of item ``name``, or None where it is not finished."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as opened:
                data = json.loads(opened.metadata()["data"])
                return {key: opened.get_tensor(key) for key in opened.keys()}, data  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged ({error}): remove it, and the run makes it again") from error

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
        """Keep item ``name``: its tensors, and ``data`` as JSON. Raises UserError where it cannot be written (a full disk)."""
        file = self.path / f"{name}.safetensors"
        temporary = file.with_suffix(".tmp")
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, str(temporary), metadata={"data": json.dumps(data)})
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{file} cannot be written ({error}): free some space or choose another work directory") from error


def open_workdir(path: Path, fingerprint: Mapping[str, str]) -> WorkDir:
    """Open or make the work directory at ``path`` for ``fingerprint``: what the work depends on, by name (model, data, settings).

    Raises UsageError where the directory belongs to another fingerprint, holds other files, or cannot be made.
    """
    file = path / FINGERPRINT
    try:
        path.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            others = [name for name, value in fingerprint.items() if found.get(name) != value]
            if others:
                raise UsageError(f"the work directory {path} belongs to another {' and '.join(others)}: remove it or choose another")
        elif any(path.iterdir()):
            raise UsageError(f"{path} is not empty and no work directory: choose another")
        else:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(dict(fingerprint), indent=1), encoding="utf-8")
            os.replace(temporary, file)
    except (OSError, ValueError) as error:
        raise UsageError(f"the work directory {path} cannot be used ({error}): choose another") from error
    return WorkDir(path)
