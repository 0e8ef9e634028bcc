"""Writes a language model that is read as another one (models/text_model.py), with that one's class of llama.cpp's conversion package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mbq_gguf.models.text_model import TextModel

Item = tuple[str, Callable[[], Any]]


def converted_as(package: Any, text: TextModel) -> Any:
    """The package's class for ``text``, which accepts a checkpoint with published names."""
    base = package.conversion.get_model_class(text.architecture, mmproj=False)

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, *args, hparams={**text.asked, **text.configuration.to_dict()}, **options)

    def filter_tensors(cls: Any, item: Item) -> Item | None:
        return item if text.names_of(item[0]) else None

    def index_tensors(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, get in base.index_tensors(self, *args, **options).items():
            found |= {ours: partial(part, text, name, get, place) for place, ours in enumerate(text.names_of(name))}
        return found

    def set_vocab(self: Any) -> None:
        if text.tokenizer is None:
            base.set_vocab(self)
            return
        directory = self.dir_model
        with tempfile.TemporaryDirectory(prefix="mbq-gguf-") as folder:  # the package reads transformers' files from a directory
            text.tokenizer(directory).save_pretrained(folder)
            self.dir_model = Path(folder)
            try:
                base.set_vocab(self)
            finally:
                self.dir_model = directory

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        return text.pre or str(base.get_vocab_base_pre(self, tokenizer))

    functions = (__init__, index_tensors, set_vocab, get_vocab_base_pre)
    methods: dict[str, Any] = {function.__name__: function for function in functions}
    own = {"model_arch": base.model_arch, "filter_tensors": classmethod(filter_tensors)}
    return type(base.__name__, (base,), {**own, **methods})


def part(text: TextModel, published: str, get: Callable[[], Any], place: int) -> Any:
    """Part ``place`` of a published tensor."""
    return text.parts_of(published, get())[place]
