"""Opens a model directory with llama.cpp's own conversion package, in this process.

The package knows, for every architecture, the metadata, the tokenizer, the names of the tensors and the order of their rows; it comes
from the llama.cpp tree in use, so files and programs always match.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError, said
from mbq_gguf.export.vocabulary import quicken
from mbq_gguf.formats.gguf_types import import_from_tree, import_gguf
from mbq_gguf.llama_cpp import paths
from mbq_gguf.models.remote_code import runs_remote_code

FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
# What a decoder's own tensors are called, whatever the model puts before it ("model.", "language_model.model.", ...).
DECODER_KEY = re.compile(r"(?:^|\.)(layers\.\d+\..+|norm\.(?:weight|bias)|embed_tokens\.weight|lm_head\.(?:weight|bias))$")
# Towers and extra heads whose layers carry the same names; the package has dropped most of them by the time we look.
FOREIGN = re.compile(r"(?:^|\.)(?:visual|vision\w*|vit|vpm|audio\w*|mtp|resampler|projector|connector|merger|talker)\.")

NEWER_PREFIX = "model."


@dataclass(frozen=True)
class Package:
    """The two modules that an export needs, both from one tree."""

    conversion: Any
    gguf: Any


def load_package() -> Package:
    """Import the conversion package of the llama.cpp tree in use. Raises UserError where nothing is built."""
    runs_remote_code()  # closes what is not allowed
    tree = paths.source_dir()
    gguf = import_gguf()  # first: the conversion package imports whatever is there
    package = Package(import_from_tree("conversion", tree), gguf)
    quicken(package.conversion.TextModel, package.gguf)
    return package


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the package's log lines, one a tensor, off the terminal; what matters of them is in the report."""
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def conversion_errors(model_dir: Path) -> Iterator[None]:
    """Turn what the package raises about a model into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it has no exceptions of its own, and the tokenizer library below it raises bare ones
        raise UserError(
            f"llama.cpp's conversion cannot read {model_dir} ({said(error)}): check its config.json, tokenizer and weights"
        ) from error


def architecture(model_dir: Path, *, mmproj: bool) -> str:
    """The architecture by which the package would convert the text model, or the vision tower, of ``model_dir``.

    Raises UserError where the package knows none such, and names those it knows.
    """
    package = load_package()
    with quiet(), conversion_errors(model_dir):
        hparams = package.conversion.ModelBase.load_hparams(model_dir, False)
        kind = package.conversion.ModelType.MMPROJ if mmproj else package.conversion.ModelType.TEXT
        name = str(package.conversion.get_model_architecture(hparams, kind))
    known = package.conversion.MMPROJ_MODEL_MAP if mmproj else package.conversion.TEXT_MODEL_MAP
    if name not in known:
        part = "vision tower" if mmproj else "language model"
        raise UserError(f"llama.cpp cannot convert the {part} of {name}: use a model of one of {', '.join(vision_architectures(package))}")
    return name


def vision_architectures(package: Package) -> list[str]:
    """Architectures of which the package can write both files."""
    return sorted(set(package.conversion.MMPROJ_MODEL_MAP) & set(package.conversion.TEXT_MODEL_MAP))


def open_model(model_dir: Path, out: Path, *, file_type: str, mmproj: bool) -> Any:
    """The package's model object for ``model_dir``, tensors indexed but not read; it will write to ``out``.

    ``file_type`` is one of :data:`FILE_TYPES`, what tensors get that nobody asks another type for. Raises UserError where the package
    cannot handle the directory.
    """
    package = load_package()
    name = architecture(model_dir, mmproj=mmproj)
    with quiet(), conversion_errors(model_dir):
        model_class = either_layout(package.conversion.get_model_class(name, mmproj=mmproj))
        return model_class(model_dir, package.gguf.LlamaFileType[FILE_TYPES[file_type]], out)


def either_layout(model_class: Any) -> Any:
    """``model_class`` of the package, which also takes the names that newer releases of transformers save.

    They put ``model.`` before the parts of a VLM (``model.visual.blocks.0...`` for ``visual.blocks.0...``). Where the package has no place
    for such a name it is asked for the older one.
    """

    def filter_tensors(cls: Any, item: tuple[str, Any]) -> Any:
        name, get = item
        found = model_class.filter_tensors.__func__(cls, item)
        if found is None and name.startswith(NEWER_PREFIX):
            found = model_class.filter_tensors.__func__(cls, (name.removeprefix(NEWER_PREFIX), get))
        return found

    def map_tensor_name(self: Any, name: str, *suffixes: Any, **options: Any) -> str:
        try:
            return str(model_class.map_tensor_name(self, name, *suffixes, **options))
        except ValueError:
            if not name.startswith(NEWER_PREFIX):
                raise
            return str(model_class.map_tensor_name(self, name.removeprefix(NEWER_PREFIX), *suffixes, **options))

    methods = {"filter_tensors": classmethod(filter_tensors), "map_tensor_name": map_tensor_name}
    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, **methods})  # each class has to name it


def decoder_names(model_tensors: dict[str, Any]) -> dict[str, str]:
    """Decoder key (``layers.0.mlp.up_proj.weight``) to the package's name of the tensor, for every decoder tensor.

    Raises UserError where two tensors of the model claim the same key.
    """
    names: dict[str, str] = {}
    for name in model_tensors:
        # The leftmost match counts, so "layers.0.mlp.norm.weight" is a layer's and not the decoder's "norm.weight".
        match = None if FOREIGN.search(name) else DECODER_KEY.search(name)
        if match is None:
            continue
        key = match.group(1)
        if key in names:
            raise UserError(f"both {names[key]} and {name} look like the decoder's {key}: this model needs an adapter of its own")
        names[key] = name
    return names
