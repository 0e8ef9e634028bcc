"""Checks of a model directory before and after it is loaded; each error has its own sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mbq_gguf import parallel
from mbq_gguf.errors import UsageError, UserError, describe
from mbq_gguf.models.language_only import language_only
from mbq_gguf.models.lazy import FileTensor, ReadCache

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
ADAPTER = "adapter_config.json"
QUANTISED = (
    "hf_quant_config.json",
    "quantize_config.json",
)  # written by TensorRT's and GPTQ's tools; config.json may not mention quantisation
COUNT_LIMIT = 2**31  # llama.cpp counts tokens, rows and layers in 32 bits
MAX_LAYERS, MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
MOST = {  # of settings for which transformers creates that many modules, or the conversion as many names
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "merger_times"), MAX_LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), MAX_EXPERTS),
}
LONGEST_EDGE = 1 << 16  # pixels
MB = 10**6
WEIGHTS = ("BF16", "F16", "F32", "F64")
# A shell command for the model's directory: one file at a time, named as llama.cpp's conversion expects; tied tensors are stored twice.
TO_SAFETENSORS = (
    """python -c "import glob, torch; from safetensors.torch import save_file; [save_file({k: v.clone() for k, v in torch.load(f, """
    """map_location='cpu', weights_only=True, mmap=True).items()}, f[8:-3] + 'safetensors', {'format': 'pt'}) """
    """for f in glob.glob('pytorch_model*.bin')]\""""
)
# Read by transformers or llama.cpp's conversion, whose errors do not name the file.
CONFIGURATIONS = (
    *PREPROCESSORS,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model directory; raises UsageError if there is none."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: give the directory of a Hugging Face model")
    path = directory / "config.json"
    if not path.is_file() and (directory / ADAPTER).is_file():
        raise UsageError(f"{directory} is an adapter (LoRA) and not a model: merge it into its model, and give the directory of the result")
    if not path.is_file():
        raise UsageError(f"{directory} has no config.json: give the directory of a Hugging Face model")
    for file in CONFIGURATIONS:
        if (directory / file).is_file():
            read_json_object(directory / file)
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises UsageError if it is something else or nested too deeply."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UsageError(f"{path} cannot be read as JSON (it is nested too deeply): download the model again") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({describe(error)}): download the model again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a model configuration: download the model again")
    return found


def check_unquantised(directory: Path, config: dict[str, Any]) -> None:
    """Raise UsageError if the checkpoint's settings say that it is already quantised; :func:`weight_files` checks its tensors."""
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if isinstance(part, dict)]
    for settings in [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]:
        if settings:
            refuse_quantised(directory, settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings)
    for name in QUANTISED:
        if (directory / name).is_file():
            refuse_quantised(directory, f"it has a {name}")


def check_counts(config: dict[str, Any]) -> None:
    """Raise UsageError for more layers or experts than llama.cpp supports; even without weights, building such a model would take
    forever."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name, most in MOST.items():
            count = part.get(name)
            if isinstance(count, int) and count > most:
                raise UsageError(f"{name} in the model's config.json is {count} and llama.cpp supports {most}: download the model again")


def check_image_size(config: dict[str, Any]) -> None:
    """Raise UserError if the vision tower's pictures have more edges than two, one shorter than a patch, or one of more than 65536 pixels;
    transformers' processor would divide by zero."""
    tower = config.get("vision_config") or {}
    size, patch = tower.get("image_size"), tower.get("patch_size")
    edges = size if isinstance(size, list) else [size] if isinstance(size, int) else []
    if len(edges) > 2 or any(edge > LONGEST_EDGE or (isinstance(patch, int) and edge < patch) for edge in edges):
        raise UserError(
            f"image_size in the model's config.json is {size!r:.60} and patch_size {patch!r:.60}, "
            f"no height and width from a patch to {LONGEST_EDGE} pixels: download the model again"
        )


def check_feature_layers(config: dict[str, Any]) -> None:
    """Raise UserError if the language model adds features of layers that the vision tower does not have (Qwen3-VL)."""
    tower = config.get("vision_config") or {}
    layers, depth = tower.get("deepstack_visual_indexes") or [], tower.get("depth")
    if isinstance(depth, int) and any(layer >= depth for layer in layers):
        raise UserError(
            f"deepstack_visual_indexes in the model's config.json is {layers!r:.60} and the tower has {depth} layers: "
            "download the model again"
        )


def positive_number(published: Mapping[str, Any], name: str, *, whole: bool = True) -> Any:
    """The setting ``name`` of a config.json, which must be a number above 0; raises UserError with its name otherwise."""
    value = published.get(name)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < COUNT_LIMIT:
        kind = "whole number" if whole else "number"
        raise UserError(f"{name} in the model's config.json is {value!r} and no {kind} above 0 that a model has: download the model again")
    return value


def positive_integers(published: Mapping[str, Any], names: Iterable[str]) -> list[int]:
    """Several such settings, all integers."""
    return [positive_number(published, name) for name in names]


def check_heads(width: int, heads: int, groups: int) -> None:
    """Raise UserError if ``heads`` does not divide ``width`` or ``groups`` does not divide ``heads``."""
    if width % heads or heads % groups:
        raise UserError(
            f"the model's config.json has {width} channels, {heads} heads and {groups} key heads, which do not divide: "
            "download the model again"
        )


def refuse_quantised(directory: Path, why: object) -> None:
    """Raise UsageError for a checkpoint that is already quantised."""
    raise UsageError(f"{directory} is already quantised ({why}): give the model that it was made from, in BF16, F16 or F32")


def check_complete(directory: Path) -> None:
    """Raise UserError if the directory also holds an adapter, which would be ignored, or lacks the image processor's settings, unless
    they are not needed."""
    adapter = directory / ADAPTER
    if adapter.is_file() or list(directory.glob("adapter_model.*")):
        raise UserError(
            f"{directory} holds an adapter (LoRA), which would be ignored: merge it into the model first, or remove the adapter_* files"
        )
    if not language_only() and not any((directory / name).is_file() for name in PREPROCESSORS):
        raise UserError(f"{directory} has no {' or '.join(PREPROCESSORS)}: download the model again, or copy the file from its base model")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model. Raises UserError if one is missing, damaged or truncated, or if a weight is quantised."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_json_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of file names: download the model again")
        names = sorted(set(names.values()))
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files and list(directory.glob("pytorch_model*.bin")):
        raise UserError(f"{directory} has its weights in *.bin files, but safetensors are needed. To convert them: {TO_SAFETENSORS}")
    if not files:
        raise UserError(f"{directory} has no *.safetensors files: fetch the model's weights, or save them as safetensors")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing although the index names it: download the model again")
        try:
            with safe_open(str(file), framework="pt") as opened:
                names = list(opened.keys())
                for name in names:
                    kind = opened.get_slice(name).get_dtype()
                    if kind not in WEIGHTS and "weight" in name:
                        refuse_quantised(directory, f"{name} is of {kind}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged ({error}): download it again") from error
    return files


def check_finite(files: Sequence[Path], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Raise a UserError that names the first weight in ``files`` that contains NaN or infinity. Reads one tensor at a time.

    Several processes share the tensors, and all raise the same error. ``progress`` gets megabytes, done and total.
    """
    named = [(file, name, size) for file in files for name, size in _sizes(file).items()]
    own = parallel.own_pieces(len(named))
    done, total = 0, sum(named[index][2] for index in own)
    spoilt = len(named)
    for index, tensor in zip(own, _read([named[index] for index in own]), strict=True):
        if not _finite(tensor):
            spoilt = index
            break
        done += named[index][2]
        progress(done // MB, total // MB)
    spoilt = min(parallel.gather_objects(spoilt))
    if spoilt < len(named):
        file, name, _ = named[spoilt]
        raise UserError(f"the weight {name} in {file} has NaN or infinite values: download the model again, or repair it")


def _read(named: Iterable[tuple[Path, str, int]]) -> Iterator[torch.Tensor]:
    """Read tensors given by file, name and size, with one file open at a time."""
    for file, theirs in groupby(named, itemgetter(0)):
        opened = ReadCache()
        yield from (FileTensor(file, name)(opened) for _, name, _ in theirs)


def _sizes(file: Path) -> dict[str, int]:
    """The sizes in bytes of the tensors of a safetensors file, from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has neither NaN nor infinity; a scalar may be infinite, as an unused bound (Gemma 4's clipped linears)."""
    if not tensor.is_floating_point() or (tensor.ndim == 0 and not tensor.isnan()) or not tensor.numel():
        return True
    # Minimum and maximum propagate NaN. A float32 sum takes seven times as long: 0.14 s of a core for 136 MB of bfloat16.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))
