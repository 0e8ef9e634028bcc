"""A model directory's config.json (``models/``, ``export/rehearsal.py``), as a dry run reads it."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from mbq_gguf.errors import UserError
from mutators import settings

from targets import TAKEN, refusal

# What Python says of a value of another kind: no sentence for who has a file to mend.
PYTHON = re.compile(
    r"KeyError|object (?:is not|has no|cannot)|NoneType|unsupported operand|unexpected keyword|not supported between|positional arg"
    r"|must be real number|<class|index out of range|division by zero|values to unpack|indices must be|can only concatenate"
)


class Settings:
    """The small checkpoints of all families, whose settings are spoilt."""

    def __init__(self) -> None:
        import tempfile

        sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "families")]
        from recipe import write
        from recipes import RECIPES
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.kept = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.names = list(RECIPES)
        self.folders = [write(recipe, Path(self.kept.name) / str(number)) for number, recipe in enumerate(RECIPES.values())]
        self.settings = [json.loads((folder / "config.json").read_text()) for folder in self.folders]

    def make(self, draw: random.Random, folder: Path) -> str:
        number = draw.randrange(len(self.names))
        for file in self.folders[number].iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        data, done = settings.mutate(self.settings[number], draw)
        (folder / "config.json").write_bytes(data)
        return f"{self.names[number]} {done}"

    def open(self) -> None:
        import torch
        from mbq_gguf.convert import ConvertOptions
        from mbq_gguf.export.conversion import load_package
        from mbq_gguf.preflight import check_inputs, run_preflight

        torch.set_num_threads(1)
        # the package knows a tokenizer by what it makes of a text, and not the small one
        load_package().conversion.TextModel.get_vocab_base_pre = lambda *_: "smollm"
        self.options, self.check, self.ahead = ConvertOptions, check_inputs, run_preflight

    def read(self, folder: Path) -> str:
        options = self.options(folder, folder / "out.gguf", synthetic=0, rounding="nearest")
        try:
            self.check(options)
            self.ahead(options, lambda _: None)
        except UserError as error:
            return in_a_persons_words(error)
        return TAKEN


def in_a_persons_words(error: UserError) -> str:
    """What a refusal gives that names what is to be mended."""
    assert not PYTHON.search(str(error)), f"Python's own words: {error}"
    return refusal(error)
