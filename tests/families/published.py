"""Rewrites checkpoints saved by transformers in the layout in which authors publish them with their own code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokens import BYTE, CONTROL, NORMAL, UNKNOWN, sentencepiece

NAMES = (
    (r"(?:model\.)?vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"(?:model\.)?vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (r"(?:model\.)?vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"(?:model\.)?vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"attention\.projection_layer", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_", "ls"),
    (r"(?:model\.)?multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"(?:model\.)?multi_modal_projector\.linear_1", "mlp1.1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^(?:model\.language_model\.|language_model\.model\.)", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
)
PARTS = ("q_proj", "k_proj", "v_proj")


def renamed(folder: Path, names: Sequence[tuple[str, str]]) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of weights, and its tensors by the names that ``names`` make of theirs, one substitution after the other."""
    (weights,) = folder.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(weights).items():
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        tensors[name] = tensor
    return weights, tensors


def internvl(folder: Path) -> None:
    """OpenGVLab's InternVLChatModel."""
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    published = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "downsample_ratio": config["downsample_ratio"],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "llm_config": text | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": {name: vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        | {name: vision[name] for name in ("hidden_act", "layer_norm_eps", "norm_type")}
        | {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "image_size": vision["image_size"][0]}
        | {"patch_size": vision["patch_size"][0], "qkv_bias": True, "qk_normalization": False},
    }
    (folder / "config.json").write_text(json.dumps(published))
    weights, tensors = renamed(folder, NAMES)
    for name in [name for name in tensors if name.startswith("vision_model") and ".attention.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", part)) for part in PARTS]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    save_file(tensors, weights, {"format": "pt"})


INTERNLM2_NAMES = (
    (r"model\.embed_tokens", "model.tok_embeddings"),
    (r"language_model\.lm_head", "language_model.output"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# The first pieces of tokenizer.model with their types, and what InternLM2's settings add there: two get another name.
FIRST = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("[UNUSED_TOKEN_142]", NORMAL), ("[UNUSED_TOKEN_141]", NORMAL))
ADDED = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PICTURE = ("<img>", "</img>", "<IMG_CONTEXT>")
PHI3_TURNS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act")
KEPT += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def internlm2(folder: Path) -> None:
    """The same with InternLM2, of which transformers has no class: q, k and v of each key head are one matrix."""
    text = with_text(folder, "InternLM2ForCausalLM", {"model_type": "internlm2", "bias": False})
    weights, tensors = renamed(folder, INTERNLM2_NAMES)
    for name in [name for name in tensors if name.startswith("language_model") and name.endswith("q_proj.weight")]:
        parts = [tensors.pop(name.replace("q_proj", part)) for part in PARTS]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = by_key_head(parts, text["num_key_value_heads"])
    save_file(tensors, weights, {"format": "pt"})
    settings = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    pieces_alone(folder, FIRST, ADDED, PICTURE, {**settings, "chat_template": TEMPLATE})


def phi3(folder: Path) -> None:
    """The same with Phi-3, as transformers has it: q, k and v are one matrix, and gate and up."""
    with_text(folder, "Phi3ForCausalLM", {"model_type": "phi3", "attention_bias": False, "sliding_window": 262144})
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": PHI3_TEMPLATE}
    pieces_alone(folder, FIRST[:4], (*ADDED[:3], "<|endoftext|>"), (*PHI3_TURNS, *PICTURE), settings, space=True)


def with_text(folder: Path, architecture: str, own: dict[str, Any]) -> dict[str, Any]:
    """OpenGVLab's InternVLChatModel with another language model, whose settings are given back."""
    internvl(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["llm_config"]
    rope = text["rope_parameters"]
    published = {name: text[name] for name in KEPT} | own | {"architectures": [architecture], "rope_theta": rope["rope_theta"]}
    published |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    if "long_factor" in rope:
        published |= {"rope_scaling": {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}}
        published |= {"original_max_position_embeddings": text["original_max_position_embeddings"]}
    (folder / "config.json").write_text(json.dumps(config | {"llm_config": published}))
    return published


def by_key_head(parts: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    """Queries, keys and values as one matrix, those of each of ``heads`` key heads together."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def pieces_alone(
    folder: Path,
    first: Sequence[tuple[str, int]],
    renamed: Sequence[str],
    more: Sequence[str],
    own: dict[str, Any],
    space: bool = False,
) -> None:
    """tokenizer.model and settings for a tokenizer.json: ``first`` pieces, which are ``renamed``, and ``more`` tokens, which have none."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    others = [token for token in tokens if token not in more][len(first) :]
    pieces = [*first, *((token, BYTE if token.startswith("<0x") else NORMAL) for token in others)]
    (folder / "tokenizer.model").write_bytes(sentencepiece(pieces, space))
    added = {str(number): added_token(token) for number, token in enumerate(renamed)}
    added |= {str(tokens[token]): added_token(token) for token in more}
    settings = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **own}))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()


def added_token(token: str) -> dict[str, Any]:
    """As tokenizer_config.json has it; Phi-3's turns leave out the white space behind them."""
    off = dict.fromkeys(("lstrip", "normalized", "single_word"), False)
    return {"content": token, "special": True, "rstrip": token in PHI3_TURNS, **off}


MINICPMV_NAMES = (
    (r"^(?:model\.language_model\.|language_model\.model\.)", "llm.model."),
    (r"^(?:language_model\.)?lm_head", "llm.lm_head"),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vpm."),
    (r"^(?:model\.)?resampler\.", "resampler."),
)


def minicpmv(folder: Path, version: float) -> None:
    """OpenBMB's MiniCPMV of ``version``: the language model's settings at the top, three matrices of the resampler's attention as one."""
    config, pictures, tokens = (
        json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    )
    code = {"architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": version}
    code |= {"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"}}
    vision = {name: value for name, value in config["vision_config"].items() if name not in ("architectures", "vision_use_head")}
    own = {"query_num": config["query_num"], "image_size": 448, "patch_size": 14, "slice_mode": True, "drop_vision_last_layer": False}
    text = config["text_config"]
    text = {name: value for name, value in text.items() if name not in ("rope_parameters", "layer_types")} | {
        "rope_theta": text["rope_parameters"]["rope_theta"]
    }
    published = text | code | own | {"vision_config": vision | {"model_type": "siglip"}}
    (folder / "config.json").write_text(json.dumps(published))
    pictures = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, "slice_mode": True, "use_image_id": True, **pictures}
    pictures |= {"image_processor_type": "MiniCPMVImageProcessor", "version": version}
    pictures |= {"auto_map": {"AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    tokens |= {"tokenizer_class": "MiniCPMVTokenizerFast"}
    tokens |= {"auto_map": {"AutoTokenizer": [None, "tokenization_minicpmv_fast.MiniCPMVTokenizerFast"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    weights, tensors = renamed(folder, MINICPMV_NAMES)
    for end in ("weight", "bias"):
        parts = [tensors.pop(f"resampler.attn.in_proj_{part}.{end}") for part in "qkv"]
        tensors[f"resampler.attn.in_proj_{end}"] = torch.cat(parts)
    tensors["resampler.proj"] = tensors.pop("resampler.proj.weight").t().contiguous()
    save_file(tensors, weights, {"format": "pt"})


def dots_ocr(folder: Path) -> None:
    """rednote-hilab's DotsOCRForCausalLM: tensors have these names already."""
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "layer_types", "dtype")}
    config |= {"architectures": ["DotsOCRForCausalLM"], "model_type": "dots_ocr", "rope_theta": 10000.0, "rope_scaling": None}
    config |= {
        "auto_map": {"AutoConfig": "configuration_dots.DotsOCRConfig", "AutoModelForCausalLM": "modeling_dots_ocr.DotsOCRForCausalLM"}
    }
    (folder / "config.json").write_text(json.dumps(config))
