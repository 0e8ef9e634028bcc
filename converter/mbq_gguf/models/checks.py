"""What is checked before and after a model directory is loaded, each fault with its own sentence."""

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
from mbq_gguf.errors import UsageError, UserError, said
from mbq_gguf.models.alone import alone
from mbq_gguf.models.stored import InFile, Made

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
ADAPTER = "adapter_config.json"
QUANTISED = ("hf_quant_config.json", "quantize_config.json")  # of TensorRT's and GPTQ's tools, beside a config.json that may say nothing
NO_COUNT = 2**31  # llama.cpp counts tokens, rows and layers in 32 bits
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "depth", "merger_times")  # settings of which transformers makes as many modules
MB = 10**6
WEIGHTS = ("BF16", "F16", "F32", "F64")
# For a shell, in the model's directory: a file at a time, under names that llama.cpp's conversion looks for; tied tensors are stored twice.
SAVE_AGAIN = (
    """python -c "import glob, torch; from safetensors.torch import save_file; [save_file({k: v.clone() for k, v in torch.load(f, """
    """map_location='cpu', weights_only=True, mmap=True).items()}, f[8:-3] + 'safetensors', {'format': 'pt'}) """
    """for f in glob.glob('pytorch_model*.bin')]\""""
)
# Read by transformers or llama.cpp's conversion, neither of which says which file was wrong.
CONFIGURATIONS = (
    *PREPROCESSORS,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model directory; a UsageError where there is none."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: give the directory of a Hugging Face model")
    path = directory / "config.json"
    if not path.is_file() and (directory / ADAPTER).is_file():
        raise UsageError(f"{directory} is an adapter (LoRA) and no model: merge it into its model, and give the directory of the result")
    if not path.is_file():
        raise UsageError(f"{directory} has no config.json: give the directory of a Hugging Face model")
    for file in CONFIGURATIONS:
        if (directory / file).is_file():
            read_object(directory / file)
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; a UsageError where it is none, or one that no program wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UsageError(f"{path} cannot be read as JSON (it is nested too deeply): fetch the model again") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({said(error)}): fetch the model again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no model configuration: fetch the model again")
    return found


def check_unquantised(directory: Path, config: dict[str, Any]) -> None:
    """Raise UsageError where the checkpoint's settings say that it is quantised already; its tensors are :func:`weight_files`' to judge."""
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if isinstance(part, dict)]
    for settings in [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]:
        if settings:
            refuse_quantised(directory, settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings)
    for name in QUANTISED:
        if (directory / name).is_file():
            refuse_quantised(directory, f"it has a {name}")


def check_layer_count(config: dict[str, Any]) -> None:
    """Raise UsageError for more layers than llama.cpp has room for; to make a model of them, without weights even, would take for ever."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in LAYER_COUNTS:
            count = part.get(name)
            if isinstance(count, int) and count > MOST_LAYERS:
                raise UsageError(f"{name} in the model's config.json is {count} and llama.cpp takes {MOST_LAYERS}: fetch the model again")


def number(published: Mapping[str, Any], name: str, *, whole: bool = True) -> Any:
    """The setting ``name`` of a config.json, a number above 0, or a UserError that names it."""
    value = published.get(name)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < NO_COUNT:
        kind = "whole number" if whole else "number"
        raise UserError(f"{name} in the model's config.json is {value!r} and no {kind} above 0 that a model has: fetch the model again")
    return value


def numbers(published: Mapping[str, Any], names: Iterable[str]) -> list[int]:
    """Several of them, whole ones."""
    return [number(published, name) for name in names]


def check_heads(width: int, heads: int, groups: int) -> None:
    """Raise UserError where ``width`` channels are not ``heads`` alike, or these no ``groups`` alike."""
    if width % heads or heads % groups:
        raise UserError(
            f"the model's config.json has {width} channels in {heads} heads, of which {groups} have keys, and they do not divide: "
            "fetch the model again"
        )


def refuse_quantised(directory: Path, why: object) -> None:
    """Raise the UsageError."""
    raise UsageError(f"{directory} is quantised already ({why}): give the model that it was made from, in BF16, F16 or F32")


def check_whole(directory: Path) -> None:
    """Raise UserError where something that belongs to the model lies beside it or is missing: an adapter, the pictures' settings
    where the model is to see some."""
    adapter = directory / ADAPTER
    if adapter.is_file() or list(directory.glob("adapter_model.*")):
        raise UserError(
            f"{directory} holds an adapter (LoRA), which would be left out: merge it into the model first, or remove the adapter_* files"
        )
    if not alone() and not any((directory / name).is_file() for name in PREPROCESSORS):
        raise UserError(f"{directory} has no {' or '.join(PREPROCESSORS)}: fetch the model again, or copy the file from its base model")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, each with a readable header and its whole length, of weights that are not quantised; a UserError
    otherwise."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of file names: fetch the model again")
        names = sorted(set(names.values()))
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files and list(directory.glob("pytorch_model*.bin")):
        raise UserError(f"{directory} has its weights in *.bin files, and safetensors are read here. To make them: {SAVE_AGAIN}")
    if not files:
        raise UserError(f"{directory} has no *.safetensors files: fetch the model's weights, or save them as safetensors")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though the index names it: fetch the model again")
        try:
            with safe_open(str(file), framework="pt") as opened:
                names = list(opened.keys())
                for name in names:
                    kind = opened.get_slice(name).get_dtype()
                    if kind not in WEIGHTS and "weight" in name:
                        refuse_quantised(directory, f"{name} is of {kind}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged ({error}): fetch it again") from error
    return files


def check_finite(files: Sequence[Path], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Raise a UserError that names the first weight in ``files`` with a NaN or an infinity. Everything is read once, one tensor at a time;
    of several processes each reads some of the tensors, and all raise the same.

    ``progress`` is called with megabytes, done and in all.
    """
    named = [(file, name, size) for file in files for name, size in _sizes(file).items()]
    own = parallel.own(len(named))
    done, total = 0, sum(named[number][2] for number in own)
    spoilt = len(named)
    for number, tensor in zip(own, _read([named[number] for number in own]), strict=True):
        if not _finite(tensor):
            spoilt = number
            break
        done += named[number][2]
        progress(done // MB, total // MB)
    spoilt = min(parallel.told(spoilt))
    if spoilt < len(named):
        file, name, _ = named[spoilt]
        raise UserError(f"the weight {name} in {file} holds NaN or infinite values: fetch the model again, or mend it")


def _read(named: Iterable[tuple[Path, str, int]]) -> Iterator[torch.Tensor]:
    """Tensors by file, name and bytes, one file's open at a time."""
    for file, theirs in groupby(named, itemgetter(0)):
        opened: Made = {}
        yield from (InFile(file, name)(opened) for _, name, _ in theirs)


def _sizes(file: Path) -> dict[str, int]:
    """The tensors of a safetensors file, and their bytes, which its header knows."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has no NaN and no infinity; a single number may be a bound that nothing reaches (Gemma 4's clipped linears)."""
    if not tensor.is_floating_point() or (tensor.ndim == 0 and not tensor.isnan()) or not tensor.numel():
        return True
    # Both are NaN where an entry is; a sum in float32 takes seven times as long, 0.14 s of a core for 136 MB of bfloat16.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))
