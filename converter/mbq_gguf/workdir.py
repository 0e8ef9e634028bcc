"""Finished work on disk, so that an interrupted run can resume.

A work directory belongs to one fingerprint of model, data and settings. Each item is one safetensors file with JSON data and a checksum in
its header, written under a temporary name and renamed when complete. A killed run therefore leaves only complete items. An item that has
been damaged since is reported and computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mbq_gguf import launch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.atomic import new_file
from mbq_gguf.parallel import broadcast_from_first

FINGERPRINT = "fingerprint.json"
TEMPORARY = ".mbq-gguf-"

Item = tuple[dict[str, torch.Tensor], Any]  # tensors, and data that JSON can represent


@dataclass(frozen=True)
class WorkDir:
    """An open work directory; see :func:`open_workdir`."""

    path: Path
    fingerprint: str  # JSON of everything that the work depends on; part of every checksum, so that no item can be used by another run
    tell: Callable[[str], object] = lambda sentence: None  # receives a message about each damaged item

    def cached(self, name: str, make: Callable[[], Item]) -> Item:
        """Item ``name`` as saved by an earlier run, or else the result of ``make``, which is then saved. Raises like :meth:`save`.

        Of several processes, only the first reads and writes.
        """
        found = self.found(name)
        if found is None:
            found = make()
            if launch.first():
                found = self.kept(name, *found)
        return found

    def found(self, name: str) -> Item | None:
        """Item ``name`` as the first process loads it, in all processes; None if there is none."""
        return broadcast_from_first(lambda: self.load(name))

    def kept(self, name: str, tensors: dict[str, torch.Tensor], data: Any) -> Item:
        """Save item ``name`` and return it with its tensors in the mapped file, so that finished items take no memory."""
        self.save(name, tensors, data)
        return self.load(name) or (tensors, data)

    def load(self, name: str) -> Item | None:
        """Tensors and JSON data of item ``name``, or None if it is missing or damaged."""
        file = self.path / f"{name}.safetensors"
        if not os.path.lexists(file):
            return None
        try:
            written, tensors = _opened(file)
            if written["checksum"] != self._checksum(name, tensors, written["data"]):
                raise ValueError("its checksum differs")
            return _opened(file)[1], json.loads(written["data"])  # mapped again, so that none of its pages are in memory
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.tell(f"{file} is damaged ({_cause(error)}): it will be computed again")
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
        """Save item ``name``: its tensors, and ``data`` as JSON. Raises UserError if it cannot be written (a full disk)."""
        file = self.path / f"{name}.safetensors"
        whole = {key: value.contiguous() for key, value in tensors.items()}
        text = json.dumps(data)
        try:
            with TemporaryDirectory(prefix=TEMPORARY, dir=self.path) as folder:  # safetensors makes another file beside it
                temporary = Path(folder) / "item"
                save_file(whole, str(temporary), metadata={"data": text, "checksum": self._checksum(name, whole, text)})
                shutil.copymode(self.path / FINGERPRINT, temporary)  # safetensors makes files that only their owner can read
                _put(temporary, file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be written ({error}): free some space or choose another work directory") from error

    def _checksum(self, name: str, tensors: Mapping[str, torch.Tensor], data: str) -> str:
        """SHA-256 of an item's contents, name and fingerprint, so that one layer's file cannot be mistaken for another's."""
        layout = [(key, str(value.dtype), list(value.shape)) for key, value in sorted(tensors.items())]
        found = hashlib.sha256(json.dumps([self.fingerprint, name, layout, data]).encode())
        for _, value in sorted(tensors.items()):
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


class NoWorkDir:
    """Replaces a work directory if nothing is to be kept."""

    def cached(self, name: str, make: Callable[[], Item]) -> Item:
        """The result of ``make``."""
        return make()

    def found(self, name: str) -> Item | None:
        """None."""

    def kept(self, name: str, tensors: dict[str, torch.Tensor], data: Any) -> Item:
        """The item itself."""
        return tensors, data


def check_workdir(path: Path, fingerprint: Mapping[str, str]) -> None:
    """Raise UsageError if the directory at ``path`` exists and has other files, or a fingerprint that differs in the given entries."""
    file = path / FINGERPRINT
    try:
        found = _read_fingerprint(file)
        others = [] if found is None else [name for name, value in fingerprint.items() if found.get(name) != value]
        if others:
            raise UsageError(
                f"the work directory {path} is of a run that differs in its {' and '.join(others)}: remove it or choose another"
            )
        if found is None and not os.path.lexists(file) and path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty and not a work directory: choose another")
    except OSError as error:
        raise UsageError(f"the work directory {path} cannot be used ({error}): choose another") from error


def open_workdir(path: Path, fingerprint: Mapping[str, str], tell: Callable[[str], object] = lambda sentence: None) -> WorkDir:
    """Open or create the work directory at ``path`` for ``fingerprint``: what the work depends on, by name (model, data, settings).

    ``tell`` receives a sentence for each damaged item. Raises UsageError if the directory belongs to another fingerprint, holds other
    files, or cannot be created.
    """
    file = path / FINGERPRINT
    text = json.dumps(dict(fingerprint), indent=1)
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_workdir(path, fingerprint)
        if _read_fingerprint(file) is None:
            if os.path.lexists(file):
                tell(f"{file} is damaged: it will be written again")
            with new_file(path, TEMPORARY) as temporary:
                temporary.write_text(text, encoding="utf-8")
                _put(temporary, file)
        for left in path.glob(f"{TEMPORARY}*"):  # left by a run that was killed while writing
            _remove(left)
    except OSError as error:
        raise UsageError(f"the work directory {path} cannot be used ({error}): choose another") from error
    return WorkDir(path, text, tell)


def _opened(file: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def _read_fingerprint(file: Path) -> dict[str, Any] | None:
    """The fingerprint in ``file``, or None if it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _put(temporary: Path, file: Path) -> None:
    """Rename ``temporary`` to ``file``, replacing whatever is there."""
    if file.is_dir():
        _remove(file)
    temporary.replace(file)


def _remove(path: Path) -> None:
    """Delete ``path``, a file or a folder; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return "it has no metadata" if isinstance(error, TypeError) else str(error)
