"""Opens a model directory with llama.cpp's own conversion package, in this process.

For every architecture, the package knows metadata, tokenizer, tensor names and the order of rows. It comes from the llama.cpp tree in use,
so files and programs always match.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError
from mbq_gguf.export.anyres_tower import ARCHITECTURES as ANYRES
from mbq_gguf.export.anyres_tower import anyres_class
from mbq_gguf.export.as_llama import text_class as as_llama_class
from mbq_gguf.export.checkpoint import names_of
from mbq_gguf.export.clip_tower import CLIP, clip_class
from mbq_gguf.export.gemma4 import ARCHITECTURE as GEMMA4
from mbq_gguf.export.gemma4 import of_gemma4
from mbq_gguf.export.llama4 import of_llama4
from mbq_gguf.export.minicpmv import text_class, vision_class
from mbq_gguf.export.text_model import converted_as
from mbq_gguf.export.vocabulary import speed_up_vocabulary
from mbq_gguf.formats.gguf_types import import_from_tree, import_gguf
from mbq_gguf.llama_cpp import paths
from mbq_gguf.models import as_llama, internvl, llama4, minicpmv
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.published import TEXT_MODELS
from mbq_gguf.models.remote_code import runs_remote_code
from mbq_gguf.models.suspects import describe_failure

FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
# Names of a decoder's tensors, after any prefix ("model.", "language_model.model.", ...).
DECODER_KEY = re.compile(r"(?:^|\.)(layers\.\d+\..+|norm\.(?:weight|bias)|embed_tokens\.weight|lm_head\.(?:weight|bias))$")
# Towers and extra heads whose layers have the same names; the package has already dropped most of them.
FOREIGN = re.compile(r"(?:^|\.)(?:visual|vision\w*|vit|vpm|audio\w*|mtp|resampler|projector|connector|merger|talker)\.")

NEWER_PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
NEWLINE = "image_newline"  # the newline embedding of LLaVA-NeXT
MTP = re.compile(r"(?:model\.)?mtp\.")
HEADS = re.compile(r"(?:model\.)?(?:lm_head|mtp)\.")  # heads of the language model, which must not be renamed to a tower's
# Vision towers by model type, if their configuration does not name a class.
TOWERS = {"internvl_vision": "InternVisionModel", "paddleocr_vl_vision": "PaddleOCRVisionModel"}
SAVED = {"mlp_AR.": "projector."}  # names that transformers saves, mapped to those of its model


@dataclass(frozen=True)
class Package:
    """The two modules for exports, from the same tree."""

    conversion: Any
    gguf: Any


def load_package() -> Package:
    """Import the conversion package of the llama.cpp tree in use. Raises UserError if nothing is built."""
    runs_remote_code()  # blocks remote code unless it is allowed
    tree = paths.source_dir()
    gguf = import_gguf()  # first, because the conversion package imports gguf
    package = Package(import_from_tree("conversion", tree), gguf)
    speed_up_vocabulary(package.conversion.TextModel, package.gguf)
    return package


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the package's log messages (one per tensor); the report has the relevant information."""
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
    """Turn the package's exceptions about a model into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it has no exception classes, and the tokenizers library raises bare Exceptions
        raise UserError(
            f"llama.cpp's conversion cannot read {model_dir} ({describe_failure(error, model_dir)}): "
            "check its config.json, tokenizer and weights"
        ) from error


def architecture(model_dir: Path, *, mmproj: bool) -> str:
    """The architecture that the package uses to convert the text model, or the vision tower, of ``model_dir``.

    Raises UserError, with the supported architectures, if the package does not support it.
    """
    package = load_package()
    with quiet(), conversion_errors(model_dir):
        hparams = package.conversion.ModelBase.load_hparams(model_dir, False)
        kind = package.conversion.ModelType.MMPROJ if mmproj else package.conversion.ModelType.TEXT
        name = str(package.conversion.get_model_architecture(hparams, kind))
    if version := minicpmv.version_of(hparams):
        return minicpmv.ARCHITECTURE if mmproj else minicpmv.TEXTS[version][1]
    if mmproj and (hparams.get("architectures") or [None])[0] in ANYRES:
        return str(hparams["architectures"][0])
    known = package.conversion.MMPROJ_MODEL_MAP if mmproj else package.conversion.TEXT_MODEL_MAP
    if name not in known:
        name = part_architecture(hparams, mmproj=mmproj) or name
    if name not in known:
        part = "vision tower" if mmproj else "language model"
        raise UserError(f"llama.cpp cannot convert the {part} of {name}: use a model of one of {', '.join(vision_architectures(package))}")
    return name


def part_architecture(hparams: Mapping[str, Any], *, mmproj: bool) -> str | None:
    """The architecture of a part by its model type, for configurations that do not name a class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    part = hparams.get("vision_config" if mmproj else "text_config") or {}
    names = TOWERS if mmproj else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = names.get(str(part.get("model_type")))
    return found if isinstance(found, str) else None


def vision_architectures(package: Package) -> list[str]:
    """The architectures for which the package can write both files."""
    return sorted(set(package.conversion.MMPROJ_MODEL_MAP) & set(package.conversion.TEXT_MODEL_MAP))


def open_model(model_dir: Path, out: Path, *, file_type: str, mmproj: bool) -> Any:
    """The package's model object for ``model_dir``, tensors indexed but not read; it will write to ``out``.

    ``file_type`` is one of :data:`FILE_TYPES`, what tensors get that nobody asks another type for. Raises UserError if the package
    cannot handle the directory.
    """
    package = load_package()
    name = architecture(model_dir, mmproj=mmproj)
    with quiet(), conversion_errors(model_dir):
        file_type_value = package.gguf.LlamaFileType[FILE_TYPES[file_type]]
        hparams = package.conversion.ModelBase.load_hparams(model_dir, False)
        model_class = accept_both_layouts(
            custom_class(package, hparams, mmproj=mmproj) or package.conversion.get_model_class(name, mmproj=mmproj)
        )
        if llama4.ARCHITECTURE in (hparams.get("architectures") or ()):
            model_class = of_llama4(model_class, hparams)
        if GEMMA4 in (hparams.get("architectures") or ()):
            model_class = of_gemma4(model_class, hparams)
        if mmproj and internvl.ARCHITECTURE in (hparams.get("architectures") or ()):
            model_class = published_internvl(model_class)
        # Keep multi-token prediction heads if the checkpoint has them; transformers drops them on saving.
        model_class.no_mtp = not any(MTP.match(tensor) for tensor in names_of(weight_files(model_dir)))
        model = model_class(model_dir, file_type_value, out)
        if hasattr(model, "impl"):  # a wrapper around another class (Mistral 3), whose methods must be wrapped instead
            model = accept_both_layouts(type(model.impl))(model_dir, file_type_value, out)
        return model


def custom_class(package: Package, hparams: Mapping[str, Any], *, mmproj: bool) -> Any | None:
    """Our own class for a model that the package has no class for, or None."""
    if version := minicpmv.version_of(hparams):
        return (vision_class if mmproj else text_class)(package, version)
    if not mmproj and as_llama.language_model(hparams):
        return as_llama_class(package)
    published = (hparams.get("architectures") or [None])[0]
    if not mmproj and published in TEXT_MODELS:
        return converted_as(package, TEXT_MODELS[published](hparams))
    if mmproj and published in ANYRES:
        return anyres_class(package)
    return clip_class(package) if mmproj and (hparams.get("vision_config") or {}).get("model_type") == CLIP else None


def accept_both_layouts(model_class: Any) -> Any:
    """``model_class`` of the package, extended to accept the names of other releases of transformers (:func:`other_names`).

    If the package does not know a name, the alternatives are tried. The class attribute ``checkpoint_names`` maps the tensors that it has
    accepted to their names in the checkpoint.
    """
    checkpoint_names: dict[str, str] = {}
    pixtral = hasattr(model_class, "img_break_tok_id")

    def filter_tensors(cls: Any, item: tuple[str, Any]) -> Any:
        name, get = item
        if name.endswith(NEWLINE) and model_class.model_type.name == "TEXT":
            return None
        if pixtral and name.endswith(EMBEDDING):
            checkpoint_names[name] = name
            return item  # one row is needed in the vision file; the package would drop the whole tensor
        if pixtral:  # accepts every name, and drops unknown ones later
            forms: tuple[str, ...] = (name.removeprefix(NEWER_PREFIX),)
        else:  # the text model's filters list what to drop, and would accept it under another name
            renamed = model_class.model_type.name == "MMPROJ" and not HEADS.match(name)
            forms = (name, *other_names(name)) if renamed else (name,)
        found = (model_class.filter_tensors.__func__(cls, (form, get)) for form in forms)
        taken = next((taken for taken in found if taken is not None), None)
        if taken is not None:
            saved = next((part for part in SAVED if name.startswith(part)), "")
            checkpoint_names[taken[0]] = SAVED.get(saved, "") + name.removeprefix(saved)
        return taken

    def map_tensor_name(self: Any, name: str, *suffixes: Any, **options: Any) -> str:
        try:
            return str(model_class.map_tensor_name(self, name, *suffixes, **options))
        except ValueError:
            for other in other_names(name):
                with suppress(ValueError):
                    return str(model_class.map_tensor_name(self, other, *suffixes, **options))
            raise

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Any:
        return model_class.modify_tensors(self, columns_first(tensor, name, self.hparams["hidden_size"]), name, layer)

    methods: dict[str, Any] = {"filter_tensors": classmethod(filter_tensors), "map_tensor_name": map_tensor_name}
    if model_class.model_arch.name == "QWEN3VLMOE":
        methods["modify_tensors"] = modify_tensors
    own = {"model_arch": model_class.model_arch, "checkpoint_names": checkpoint_names}  # each class has to name its model_arch
    return type(model_class.__name__, (model_class,), {**own, **methods})


def published_internvl(model_class: Any) -> Any:
    """``model_class`` of :func:`accept_both_layouts` with tensors renamed to transformers' own layout: separate q, k and v."""
    names: dict[str, str] = model_class.checkpoint_names

    def index_tensors(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for taken, get in model_class.index_tensors(self, *args, **options).items():
            theirs = internvl.names_of(names.pop(taken))
            for place, name in enumerate(theirs):
                part = taken.replace(".attn.qkv.", f".self_attn.{'qkv'[place]}_proj.")
                names[part] = name
                found[part] = get if len(theirs) == 1 else lambda get=get, place=place: get().chunk(3)[place]
        return found

    return type(model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, "index_tensors": index_tensors})


def columns_first(tensor: Any, name: str, width: int) -> Any:
    """A stack of experts as [experts, columns, rows], as Qwen3-VL is published and as the package expects.

    transformers saves models that it has created as [experts, rows, columns], and distinguishes the two by shape, as here. Square matrices
    are assumed to be in the published layout.
    """
    axis = {"gate_up_proj": -1, "down_proj": -2}.get(name.rpartition(".experts.")[2])
    square = axis is None or tensor.shape[-1] == tensor.shape[-2]
    return tensor if square or axis is None or tensor.shape[axis] != width else tensor.transpose(-1, -2)


def other_names(name: str) -> Iterable[str]:
    """The names of tensor ``name`` in other releases of transformers.

    Newer ones prefix the parts of a VLM with ``model.`` (``model.visual.blocks.0...``); the newest omit ``vision_model.`` in CLIP and
    SigLIP towers.
    """
    for form in (name.removeprefix(NEWER_PREFIX), NEWER_PREFIX + name.removeprefix(NEWER_PREFIX)):
        if form != name:
            yield form
        if "vision_tower." in form and "vision_model." not in form:
            yield form.replace("vision_tower.", "vision_tower.vision_model.", 1)


def decoder_names(model_tensors: dict[str, Any]) -> dict[str, str]:
    """Map decoder keys (``layers.0.mlp.up_proj.weight``) to the package's tensor names, for all decoder tensors.

    Raises UserError if two tensors of the model claim the same key.
    """
    names: dict[str, str] = {}
    for name in model_tensors:
        # The leftmost match counts: "layers.0.mlp.norm.weight" belongs to a layer and is not the decoder's "norm.weight".
        match = None if FOREIGN.search(name) else DECODER_KEY.search(name)
        if match is None:
            continue
        key = match.group(1)
        if key in names:
            raise UserError(f"both {names[key]} and {name} look like the decoder's {key}: this model needs an adapter of its own")
        names[key] = name
    return names
