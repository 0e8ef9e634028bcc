"""The readers of this project: every input is taken or refused in one sentence."""

from __future__ import annotations

import io
import random
import shutil
import struct
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from mbq_gguf.errors import USER_ERRORS, UserError
from mutators import conversations, gguf, picture, safetensors_file, workdir

from targets import TAKEN, Spoilt, refusal


class Header(Spoilt):
    """The header of a GGUF file (``export/gguf_header.py``), text and mmproj."""

    mutator, file, folders = gguf, "model.gguf", ("text", "mmproj")

    def open(self) -> None:
        from mbq_gguf.export import gguf_header

        gguf_header.import_gguf = lru_cache(gguf_header.import_gguf)  # type: ignore[attr-defined]  # it looks for the build each time
        self.reader = gguf_header.read_header

    def read(self, folder: Path) -> str:
        try:
            self.reader(folder / "model.gguf")
        except UserError as error:
            return refusal(error)
        return TAKEN


class Inspect(Header):
    """What ``mbq-gguf inspect`` prints, to the last character."""

    def open(self) -> None:
        super().open()
        from mbq_gguf.export.inspect import inspect

        self.inspect = inspect

    def read(self, folder: Path) -> str:
        from rich.console import Console

        try:
            Console(file=io.StringIO(), width=100).print(self.inspect(folder / "model.gguf"))
        except UserError as error:
            return refusal(error)
        return TAKEN


class Conversations:
    """A set of conversations (``conversations.py``), for calibration and for eval."""

    def make(self, draw: random.Random, folder: Path) -> str:
        data, done = conversations.mutate(draw)
        (folder / "set.jsonl").write_bytes(data)
        (folder / "cat.png").touch()
        return done

    def open(self) -> None:
        from mbq_gguf.conversations import read_scenes

        self.reader = read_scenes

    def read(self, folder: Path) -> str:
        for unanswered in (True, False):
            try:
                scenes = self.reader(folder / "set.jsonl", unanswered=unanswered)
            except UserError as error:
                return refusal(error)
            assert scenes
            assert all(scene.turns and (unanswered or all(turn.answer for turn in scene.turns)) for scene in scenes)
        return TAKEN


class Safetensors(Spoilt):
    """A model's weights (``models/checks.py``, ``export/checkpoint.py``): names, shapes, numbers."""

    mutator, file = safetensors_file, "model.safetensors"

    def __init__(self) -> None:
        header = (
            b'{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]},'
            b'"a.bias":{"dtype":"F32","shape":[4],"data_offsets":[64,80]},"n":{"dtype":"I64","shape":[],"data_offsets":[80,88]}}'
        )
        self.seeds = [struct.pack("<Q", len(header)) + header + bytes(88)]

    def open(self) -> None:
        from mbq_gguf.export import checkpoint
        from mbq_gguf.models import checks

        self.checkpoint, self.checks = checkpoint, checks

    def read(self, folder: Path) -> str:
        try:
            files = self.checks.weight_files(folder)
            names, shapes = self.checkpoint.names_of(files), list(self.checkpoint.shapes(files))
            assert len(names) == len(shapes)
            self.checks.check_finite(files)
        except UserError as error:
            return refusal(error)
        return TAKEN


class WorkDirectory:
    """A work directory (``workdir.py``): an item is what was saved, or is made again."""

    WHAT: ClassVar = {"model": "a", "data": "b"}

    def make(self, draw: random.Random, folder: Path) -> str:
        path = folder / "work"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self._whole(), path)
        return workdir.mutate(path, draw)

    def open(self) -> None:
        from mbq_gguf.workdir import open_workdir

        self.opener = open_workdir
        self.tensors, self.data = _items()
        self._whole()  # before any child, which would leave one of its own behind

    def read(self, folder: Path) -> str:
        import torch

        told: list[str] = []
        try:
            opened = self.opener(folder / "work", self.WHAT, told.append)
            found = [opened.load(f"layer-{layer}") for layer in range(2)]
            opened.save("layer-0", self.tensors[0], self.data[0])
            again = opened.load("layer-0")
        except UserError as error:
            return refusal(error)
        for layer, item in enumerate([*found, again]):
            if item is not None:
                tensors, data = item
                assert data == self.data[layer % 2], "another item's data"
                assert tensors.keys() == self.tensors[layer % 2].keys(), "another item's tensors"
                assert all(torch.equal(tensors[key], value) for key, value in self.tensors[layer % 2].items()), "damage not seen"
        assert again is not None, "what was just saved is not found"
        return TAKEN

    def _whole(self) -> Path:
        """A work directory of two items, made once per process."""
        import tempfile

        from mbq_gguf.workdir import open_workdir

        if not hasattr(self, "whole"):
            self.kept = tempfile.TemporaryDirectory(prefix="fuzz-")
            self.whole = Path(self.kept.name) / "work"
            opened = open_workdir(self.whole, self.WHAT)
            for layer, (tensors, data) in enumerate(zip(*_items(), strict=True)):
                opened.save(f"layer-{layer}", tensors, data)
        return self.whole


def _items() -> tuple[list[dict[str, object]], list[object]]:
    import torch

    tensors = [{"q": torch.arange(12, dtype=torch.uint8).reshape(3, 4), "x": torch.ones(2) * layer} for layer in range(2)]
    return tensors, [{"ratio": 0.5 * layer, "words": ["a"]} for layer in range(2)]  # type: ignore[return-value]


class Picture(Spoilt):
    """A picture (``picture.py``), as calibration, eval and ``ask`` open it."""

    mutator, file, folders = picture, "picture", ("picture",)

    def open(self) -> None:
        import warnings

        from mbq_gguf.picture import png

        warnings.simplefilter("ignore")  # pillow's words on what it mends
        self.reader = png

    def read(self, folder: Path) -> str:
        try:
            assert self.reader(folder / "picture").startswith(b"\x89PNG")
        except USER_ERRORS as error:
            return refusal(error)
        return TAKEN
