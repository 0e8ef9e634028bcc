"""Loads a model directory as a LoadedModel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from mbq_gguf.errors import UsageError, UserError, describe
from mbq_gguf.models import as_llama, internvl, llama4
from mbq_gguf.models.checks import (
    check_complete,
    check_counts,
    check_feature_layers,
    check_finite,
    check_image_size,
    check_unquantised,
    read_config,
    read_json_object,
    weight_files,
)
from mbq_gguf.models.config_types import check_config_types
from mbq_gguf.models.decoder import check_layers, find_decoder
from mbq_gguf.models.families import FAMILIES, LANGUAGE_ALONE, REFUSED, family_of, kind
from mbq_gguf.models.file_rows import leave_in_file
from mbq_gguf.models.language_only import language_only
from mbq_gguf.models.lazy import LazyTensor, lazy_tensors, materialise, tensors_of
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import ImagePrompt, NoImagePrompt, ProcessorImagePrompt, Prompts, RuntimePrompt
from mbq_gguf.models.published import PUBLISHED, TEXT_MODELS, silence_type_warning
from mbq_gguf.models.remote_code import runs_remote_code
from mbq_gguf.models.suspects import describe_failure
from mbq_gguf.models.text_model import TextModel
from mbq_gguf.models.tokenizer import load_tokenizer
from mbq_gguf.settings import LANGUAGE_ONLY, TRUST

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")
# Audio is not calibrated; llama.cpp's conversion reads these tensors from the files.
AUDIO = re.compile(r"(?:model\.)?(?:audio_tower|embed_audio)\.")
SUPPORTED = f"a family that `mbq-gguf models` lists ({', '.join(family.name for family in FAMILIES)})"


def load(
    model_dir: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prompts: Prompts | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedModel:
    """Load a VLM from a Hugging Face directory for calibration.

    ``dtype`` is the dtype of the computation; decoder layers stay in their files until they are needed. ``prompts`` can be reused from
    :func:`load_meta` of the same directory. ``progress`` reports the check of all weights, in megabytes.
    Raises UserError or UsageError for a directory that is not a model, an unsupported or text-only architecture, missing or truncated
    weights, and NaN weights.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model_dir = Path(model_dir)
    architecture = check_source(model_dir)
    files = weight_files(model_dir)
    model = _load_weights(model_dir, architecture, files)
    if architecture == llama4.ARCHITECTURE:
        llama4.add_image_outputs(model)
    check_finite(files, progress)
    decoder = find_decoder(model, architecture)
    if decoder is None:
        raise UsageError(f"{architecture} is not supported, its decoder layers were not found: use a model of {SUPPORTED}")
    check_layers(decoder, architecture, SUPPORTED)
    model.requires_grad_(False)
    device = torch.device(device)
    left = leave_in_file(decoder.module, device, dtype)
    of_layers = set(decoder.layers.modules())
    in_files = [found for found in tensors_of(model) if isinstance(found[2], LazyTensor) and found[0] not in of_layers]
    materialise(model, device, dtype, left=[decoder.layers, *left])
    prompts = prompts or _load_prompts(model_dir, architecture, model)
    return LoadedModel(model_dir, architecture, model, decoder, prompts, device, dtype, in_files)


def load_meta(model_dir: Path) -> LoadedModel:
    """Load the model of a directory without its weights (on torch's meta device): layers, shapes, tokenizer and prompts, in seconds.

    Raises UserError or UsageError like :func:`load`, for everything but the weights.
    """
    architecture = check_source(model_dir)
    model = _empty_model(model_dir, architecture)
    _read_generation(model, model_dir, architecture)
    decoder = find_decoder(model, architecture)
    if decoder is None:
        raise UsageError(f"{architecture} is not supported, its decoder layers were not found: use a model of {SUPPORTED}")
    check_layers(decoder, architecture, SUPPORTED)
    return LoadedModel(
        model_dir, architecture, model, decoder, _load_prompts(model_dir, architecture, model), torch.device("meta"), torch.float32
    )


def check_source(model_dir: Path) -> str:
    """Check everything about a model directory that does not need its weights; returns the architecture's name."""
    config = read_config(model_dir)
    check_config_types(config)
    architecture = check_architecture(config)
    check_unquantised(model_dir, config)
    check_counts(config)
    check_image_size(config)
    check_feature_layers(config)
    as_llama.check(config)
    internvl.check(config)
    check_complete(model_dir)
    if architecture not in (*PUBLISHED, *TEXT_MODELS):
        with model_errors(model_dir, architecture, "config.json"):
            configuration(model_dir)
    return architecture


def check_architecture(config: dict[str, Any]) -> str:
    """The architecture's name; raises UsageError unless it is a supported VLM."""
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "unknown"))
    if not isinstance(config.get("vision_config") or {}, dict):
        raise UsageError(f"vision_config in the model's config.json is not a JSON object: download the model again ({architecture})")
    architecture = kind(architecture, config)
    by_itself = architecture in LANGUAGE_ALONE
    if language_only() and not by_itself and architecture not in REFUSED:
        raise UsageError(f"{architecture} is converted with its vision tower: leave out {LANGUAGE_ONLY}")
    if architecture in REFUSED and not (language_only() and by_itself):
        other = f", or give {LANGUAGE_ONLY}" if by_itself else ""
        raise UsageError(f"{architecture} is not supported, {REFUSED[architecture]}: use a model of {SUPPORTED}{other}")
    if architecture in (*PUBLISHED, *TEXT_MODELS):
        silence_type_warning()
    if language_only():
        return architecture
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as texts
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known

    if "vision_config" not in config and config.get("model_type") in {**texts}.keys() - {**known}.keys():
        raise UsageError(f"{architecture} is a text-only model: give a vision-language model of {SUPPORTED}")
    if "vision_config" not in config:
        raise UsageError(f"{architecture} is not supported, its config.json has no vision tower: use a model of {SUPPORTED}")
    if family_of(architecture):
        return architecture
    if "auto_map" in config and str(config.get("model_type")) not in known:
        if not runs_remote_code():
            raise UsageError(
                f"{architecture} needs Python code from its directory: give {TRUST} if you trust its authors, or use another model"
            )
    elif str(config.get("model_type")) not in known:
        raise UsageError(f"{architecture} is not supported: use a model of {SUPPORTED}")
    return architecture


@contextmanager
def reraise_as(what: str, way_out: str, architecture: str, model_dir: Path) -> Iterator[None]:
    """Turn any exception of transformers into one sentence: ``what`` is wrong, the settings of config.json that are suspected or the
    library's message, and the ``way_out``."""
    try:
        yield
    except UserError:  # code in the directory was refused
        raise
    except ImportError as error:
        raise UserError(f"transformers needs another package for {architecture} ({describe(error)}): install it with pip") from error
    except Exception as error:  # bad files can raise anything; the tokenizers library raises bare Exceptions
        raise UserError(f"{what} ({describe_failure(error, model_dir)}): {way_out}") from error


def settings_errors(model_dir: Path, architecture: str) -> AbstractContextManager[None]:
    """Errors while reading the files other than the weights."""
    what = f"the tokenizer, image processor or generation settings in {model_dir} cannot be used"
    return reraise_as(what, "download them again", architecture, model_dir)


def model_errors(model_dir: Path, architecture: str, file: str = "") -> AbstractContextManager[None]:
    """Errors while building a model class of transformers from a directory, or from a ``file`` in it."""
    return reraise_as(f"{model_dir / file} cannot be loaded as {architecture}", "download the model again", architecture, model_dir)


def configuration(model_dir: Path) -> Any:
    """The configuration object of config.json, validated by its class."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=runs_remote_code())


def _empty_model(model_dir: Path, architecture: str) -> Any:
    """The model on the meta device, without weights."""
    from transformers import AutoModelForImageTextToText

    with model_errors(model_dir, architecture), torch.device("meta"):
        if architecture in PUBLISHED:
            return PUBLISHED[architecture].empty_model(model_dir)
        if text := text_model(model_dir, architecture):
            return text.empty_model()
        config = configuration(model_dir)
        if getattr(config, "audio_config", None):
            config.audio_config = None
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=runs_remote_code())


def text_model(model_dir: Path, architecture: str) -> TextModel | None:
    """The :class:`TextModel` that reads the language model of ``architecture`` as another, or None."""
    return TEXT_MODELS[architecture](read_json_object(model_dir / "config.json")) if architecture in TEXT_MODELS else None


def _read_generation(model: Any, model_dir: Path, architecture: str) -> None:
    """Read the generation settings, if there are any: they name the tokens that end an answer."""
    from transformers import GenerationConfig

    if (model_dir / "generation_config.json").is_file():
        with settings_errors(model_dir, architecture):
            model.generation_config = GenerationConfig.from_pretrained(str(model_dir), local_files_only=True)


def _load_weights(model_dir: Path, architecture: str, files: Sequence[Path]) -> Any:
    """The model with all weights as lazy tensors of ``files``."""
    empty = _empty_model(model_dir, architecture)
    tensors = {name: tensor for name, tensor in lazy_tensors(files).items() if not AUDIO.match(name)}
    with model_errors(model_dir, architecture):
        if architecture in PUBLISHED:
            tensors = PUBLISHED[architecture].rename_tensors(tensors, empty.config)
        elif text := text_model(model_dir, architecture):
            tensors = text.rename_tensors(tensors)
        model, info = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=tensors,
            dtype="auto",
            output_loading_info=True,
            attn_implementation="sdpa",
        )
    _read_generation(model, model_dir, architecture)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"{model_dir} lacks {len(info['missing_keys'])} weights, {first} first: download the model again")
    return model.eval()


def _load_prompts(model_dir: Path, architecture: str, model: Any) -> Prompts:
    from transformers import AutoImageProcessor, AutoProcessor

    path, family = str(model_dir), family_of(architecture)
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{model_dir} has no tokenizer ({', '.join(TOKENIZER_FILES)}): download the model again")
    with settings_errors(model_dir, architecture):
        text = text_model(model_dir, architecture)
        tokenizer = text.tokenizer(model_dir) if text and text.tokenizer else load_tokenizer(model_dir)
        if language_only():
            begin = tuple(tokenizer.convert_tokens_to_ids(list(text.begin))) if text else ()
            return Prompts(tokenizer, NoImagePrompt(), -1, _end_ids(model, tokenizer), begin)
        image_token_id = _image_token_id(model.config)
        image_prompt: ImagePrompt
        template: Any
        if family:
            own = PUBLISHED[architecture].image_processor if architecture in PUBLISHED else family.picture.processor
            options = {"local_files_only": True, "backend": "pil", "trust_remote_code": runs_remote_code()}
            images = own(model_dir) if own else AutoImageProcessor.from_pretrained(path, **options)
            template = tokenizer
            image_prompt = RuntimePrompt(template, tokenizer, images, family.picture, image_token_id, model.config)
        else:
            template = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=runs_remote_code())
            image_prompt = ProcessorImagePrompt(template, image_token_id)
        end_ids = _end_ids(model, tokenizer)
    older = model_dir / "chat_template.json"  # used by processors before chat_template.jinja
    if not getattr(template, "chat_template", None) and older.is_file():
        template.chat_template = read_json_object(older).get("chat_template")
    if not getattr(template, "chat_template", None):
        raise UserError(f"{model_dir} has no chat template, which calibration needs: download the model again with chat_template.json")
    prompts = Prompts(tokenizer, image_prompt, image_token_id, end_ids)
    prompts.check()
    return prompts


def _image_token_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError("its configuration names no image token")


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All tokens that end an answer: the tokenizer's and those of the generation configuration."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)
