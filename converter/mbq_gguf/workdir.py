"""Finished work on disk, so that a stopped run goes on where it was.

A work directory belongs to one fingerprint of model, data and settings. Every item is one safetensors file with its JSON and a checksum
in the header, written under a temporary name and renamed when whole. A killed run leaves only whole items; an item that a disk, a crash
or a hand has changed since is told and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mbq_gguf import launch
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.atomic import new_file
from mbq_gguf.parallel import from_first

FINGERPRINT = "fingerprint.json"
TEMPORARY = ".mbq-gguf-"

Item = tuple[dict[str, torch.Tensor], Any]  # tensors, and data as JSON has them


@dataclass(frozen=True)
class WorkDir:
    """An open work directory; see :func:`open_workdir`."""

    path: Path
    fingerprint: str  # the JSON of what the work depends on; part of every checksum, so that no item serves another run
    tell: Callable[[str], object] = lambda sentence: None  # hears of items that are damaged

    def cached(self, name: str, make: Callable[[], Item]) -> Item:
        """Item ``name`` as an earlier run has saved it, or as ``make`` makes it, which is then saved. Raises as :meth:`save` does.

        Of several processes the first alone reads and writes.
        """
        found = self.found(name)
        if found is None:
            found = make()
            if launch.first():
                found = self.kept(name, *found)
        return found

    def found(self, name: str) -> Item | None:
        """What the first process finds of item ``name``, in all of them."""
        return from_first(lambda: self.load(name))

    def kept(self, name: str, tensors: dict[str, torch.Tensor], data: Any) -> Item:
        """Item ``name``, saved: its tensors lie in the mapped file then, so that what is finished takes no memory."""
        self.save(name, tensors, data)
        return self.load(name) or (tensors, data)

    def load(self, name: str) -> Item | None:
        """Tensors and JSON data of item ``name``, or None where it is not finished or not as it was saved."""
        file = self.path / f"{name}.safetensors"
        if not os.path.lexists(file):
            return None
        try:
            written, tensors = _opened(file)
            if written["checksum"] != self._checksum(name, tensors, written["data"]):
                raise ValueError("its checksum differs")
            return _opened(file)[1], json.loads(written["data"])  # mapped anew: no page of it is in memory yet
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.tell(f"{file} is damaged ({_cause(error)}): it will be made again")
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
        """Keep item ``name``: its tensors, and ``data`` as JSON. Raises UserError where it cannot be written (a full disk)."""
        file = self.path / f"{name}.safetensors"
        whole = {key: value.contiguous() for key, value in tensors.items()}
        text = json.dumps(data)
        try:
            with new_file(self.path, TEMPORARY) as temporary:
                save_file(whole, str(temporary), metadata={"data": text, "checksum": self._checksum(name, whole, text)})
                _put(temporary, file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be written ({error}): free some space or choose another work directory") from error

    def _checksum(self, name: str, tensors: Mapping[str, torch.Tensor], data: str) -> str:
        """SHA-256 of everything in an item, of its name, and of whose it is: one layer's file does not pass for another's."""
        layout = [(key, str(value.dtype), list(value.shape)) for key, value in sorted(tensors.items())]
        found = hashlib.sha256(json.dumps([self.fingerprint, name, layout, data]).encode())
        for _, value in sorted(tensors.items()):
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


class Unkept:
    """Stands for a work directory where nothing is to be kept."""

    def cached(self, name: str, make: Callable[[], Item]) -> Item:
        """What ``make`` makes."""
        return make()

    def found(self, name: str) -> Item | None:
        """Nothing."""

    def kept(self, name: str, tensors: dict[str, torch.Tensor], data: Any) -> Item:
        """The item as it is."""
        return tensors, data


def check_workdir(path: Path, fingerprint: Mapping[str, str]) -> None:
    """UsageError where the directory at ``path``, if it is there, belongs to another fingerprint, so far as this one goes, or holds other
    files."""
    file = path / FINGERPRINT
    try:
        found = _read_fingerprint(file)
        others = [] if found is None else [name for name, value in fingerprint.items() if found.get(name) != value]
        if others:
            raise UsageError(
                f"the work directory {path} is of a run that differs in its {' and '.join(others)}: remove it or choose another"
            )
        if found is None and not os.path.lexists(file) and path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty and no work directory: choose another")
    except OSError as error:
        raise UsageError(f"the work directory {path} cannot be used ({error}): choose another") from error


def open_workdir(path: Path, fingerprint: Mapping[str, str], tell: Callable[[str], object] = lambda sentence: None) -> WorkDir:
    """Open or make the work directory at ``path`` for ``fingerprint``: what the work depends on, by name (model, data, settings).

    ``tell`` takes a sentence for each item that is found damaged. Raises UsageError where the directory belongs to another fingerprint,
    holds other files, or cannot be made.
    """
    file = path / FINGERPRINT
    text = json.dumps(dict(fingerprint), indent=1)
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_workdir(path, fingerprint)
        if _read_fingerprint(file) is None:
            if os.path.lexists(file):
                tell(f"{file} is damaged: it will be made again")
            with new_file(path, TEMPORARY) as temporary:
                temporary.write_text(text, encoding="utf-8")
                _put(temporary, file)
        for left in path.glob(f"{TEMPORARY}*"):  # of a run that was killed while it wrote
            _remove(left)
    except OSError as error:
        raise UsageError(f"the work directory {path} cannot be used ({error}): choose another") from error
    return WorkDir(path, text, tell)


def _opened(file: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def _read_fingerprint(file: Path) -> dict[str, Any] | None:
    """What ``file`` says, or None where it says nothing that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _put(temporary: Path, file: Path) -> None:
    """Give ``temporary`` its final name, whatever bears it now."""
    if file.is_dir():
        _remove(file)
    temporary.replace(file)


def _remove(path: Path) -> None:
    """What ``path`` names is gone afterwards, a folder too; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return "it has no metadata" if isinstance(error, TypeError) else str(error)
