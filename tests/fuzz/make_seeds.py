"""Makes seeds/: valid files of a few kilobytes, from which every corrupted one is made.

    python tests/fuzz/make_seeds.py

The GGUF files are a random Qwen2-VL smaller than that of the tests, with the first tokens of its vocabulary, and the vision towers of
the other families, each as wide as its language model; llama.cpp loads all of them.
"""

from __future__ import annotations

import copy
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "families")]

from mutators.gguf_document import ARRAY, Document, Key, Tensor, copy_of, strings, u32, u64  # noqa: E402
from recipe import write  # noqa: E402
from recipe_parts import TEXT  # noqa: E402
from recipes import RECIPES  # noqa: E402
from recipes_gemma import AUDIO  # noqa: E402
from tiny_vlm import DEMO, PROCESSOR_FILES  # noqa: E402

SEEDS = HERE / "seeds"
WIDTH, TOKENS, MERGES = 128, 288, 8
Q8_0 = 8
SMALL = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 8}
QWEN, SIGLIP = SMALL | {"depth": 3, "num_heads": 1}, SMALL | {"num_attention_heads": 1, "image_size": 32}
WIDER = QWEN | {"hidden_size": WIDTH, "embed_dim": 32, "mlp_ratio": 2}
HEARING = {"hidden_size": 16, "num_attention_heads": 1, "output_proj_dims": 32}
GEMMA4 = SIGLIP | {"head_dim": 16, "num_key_value_heads": 1, "position_embedding_size": 32}
TILES = [[32, 64], [64, 64]]  # height and width
TOWERS: list[tuple[str, str, dict[str, object], dict[str, object]]] = [
    ("w8a8", "Qwen2-VL", WIDER, {}),
    ("qwen2_5vl", "Qwen2.5-VL", QWEN | {"fullatt_block_indexes": [1]}, {}),
    ("qwen3vl", "Qwen3-VL", QWEN | {"deepstack_visual_indexes": [0], "out_hidden_size": WIDTH // 2, "num_position_embeddings": 16}, {}),
    ("idefics3", "Idefics3", SIGLIP, {}),
    ("pixtral", "Mistral 3", SIGLIP | {"head_dim": 16}, {}),
    ("internvl", "InternVL 3 (-hf)", SIGLIP | {"patch_size": [8, 8], "image_size": [32, 32]}, {}),
    ("gemma3", "Gemma 3", SIGLIP, {"mm_tokens_per_image": 4}),
    ("glm4v", "GLM-4.1V", QWEN | {"image_size": 32}, {}),
    ("llava", "LLaVA-1.5", SIGLIP, {}),
    ("gemma4", "Gemma 4 (E2B, E4B)", GEMMA4, {"audio_config": AUDIO | HEARING}),
    ("minicpmv", "MiniCPM-V 2.6", SMALL | {"num_attention_heads": 1, "patch_size": 14}, {"text_config": TEXT | {"model_type": "qwen2"}}),
    (
        "llama4",
        "Llama 4",
        SIGLIP | {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        {},
    ),
    ("minicpmv4_6", "MiniCPM-V 4.6", SMALL | {"num_attention_heads": 1, "patch_size": 14}, {"insert_layer_id": 0}),
    ("anyres", "LLaVA-OneVision", SIGLIP, {"image_grid_pinpoints": TILES[1:], "vision_aspect_ratio": "anyres_max_2"}),
    ("llava_next", "LLaVA-NeXT", SIGLIP, {"image_grid_pinpoints": TILES}),
    ("paddleocr", "PaddleOCR-VL", SIGLIP, {}),
    ("dots_ocr", "dots.ocr", SMALL | {"embed_dim": 16, "num_attention_heads": 1}, {}),
]
HADAMARD = Key(b"mbq.hadamard.ffn_down", 4, u32(64))


def write_model(directory: Path) -> Path:
    """A random Qwen2-VL of width 128; patches of 8 pixels."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(DEMO))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = WIDTH, WIDTH, 3
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.layer_types = text.layer_types[:3]
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size, vision.patch_size = 3, 16, 1, WIDTH, 8
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_few_values(parameter))
    model.to(torch.bfloat16).save_pretrained(str(directory))
    for file in PROCESSOR_FILES:
        shutil.copy(DEMO / file, directory / file)
    return directory


def smaller(data: bytes) -> Document:
    """The file with one layer and the first :data:`TOKENS` tokens."""
    whole = copy_of(data)
    sizes = _sizes(whole)
    small = Document([], [], b"", version=whole.version)
    for key in whole.keys:
        small.put(_fewer(key))
    for tensor, size in zip(whole.tensors, sizes, strict=True):
        if any(tensor.name.startswith((b"blk.%d." % layer, b"v.blk.%d." % layer)) for layer in (1, 2, 3)):
            continue
        content, dims = whole.data[tensor.offset : tensor.offset + size], tensor.dims
        if tensor.name == b"token_embd.weight":
            content, dims = content[: size // dims[1] * TOKENS], (dims[0], TOKENS)
        small.tensors.append(Tensor(tensor.name, dims, tensor.kind, len(small.data)))
        small.data += content + bytes(-len(content) % 32)
    return small


def _fewer(key: Key) -> Key:
    if key.name.endswith(b".block_count"):
        return key._replace(payload=u32(1))
    if key.name in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges"):
        kept, count, at = [], TOKENS if key.name.endswith(b"tokens") else MERGES, 12
        for _ in range(count):
            length = struct.unpack_from("<Q", key.payload, at)[0]
            kept.append(key.payload[at + 8 : at + 8 + length])
            at += 8 + length
        return key._replace(payload=strings(kept))
    if key.name in (b"tokenizer.ggml.token_type", b"tokenizer.ggml.scores"):
        return key._replace(payload=key.payload[:4] + u64(TOKENS) + key.payload[12 : 12 + 4 * TOKENS])
    return key


def _sizes(document: Document) -> list[int]:
    ends = [*sorted(tensor.offset for tensor in document.tensors), len(document.data)]
    return [ends[ends.index(tensor.offset) + 1] - tensor.offset for tensor in document.tensors]


def ggufs() -> None:
    """Language models of several types, and the vision file."""
    from io import StringIO

    from mbq_gguf.convert import ConvertOptions, convert
    from rich.console import Console

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        for name, kind, extra in (
            ("mbq3s", "MBQ3S", None),
            ("mbq3_64", "MBQ3_64", HADAMARD),
            ("w4a8", "W4A8", None),
        ):
            options = ConvertOptions(model, Path(folder) / "out.gguf", type=kind, method="rtn", rounding="nearest")
            report = convert(options, Console(file=StringIO()))
            document = smaller(report.out.read_bytes())
            _repair(document)
            if extra:
                document.put(extra)
            (SEEDS / "text" / f"{name}.gguf").write_bytes(document.write())
        vision = smaller(report.mmproj.read_bytes())
        vision.put(Key(b"clip.vision.image_min_pixels", 4, u32(16 * 16)))
        vision.put(Key(b"clip.vision.image_max_pixels", 4, u32(64 * 64)))
        (SEEDS / "mmproj" / "f16.gguf").write_bytes(vision.write())


def towers() -> None:
    """The vision file of each of the other families, which have the language model's width."""
    from mbq_gguf.export.gguf_writer import write_mmproj_gguf
    from safetensors.torch import load_file, save_file

    for name, family, vision, extra in TOWERS:
        recipe = RECIPES[family]
        config = copy.deepcopy(recipe.config)
        config["vision_config"] |= vision
        config |= extra
        with tempfile.TemporaryDirectory() as folder:
            model = write(replace(recipe, config=config, processor=recipe.processor | {"patch_size": 8}), Path(folder) / "model")
            (weights,) = model.glob("*.safetensors")
            save_file({key: _few_values(value) for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
            write_mmproj_gguf(model, Path(folder) / "mmproj.gguf", mmproj_type="Q8_0" if name == "w8a8" else "F16")
            document = smaller((Path(folder) / "mmproj.gguf").read_bytes())
        for key, side in ((b"clip.vision.image_min_pixels", 16), (b"clip.vision.image_max_pixels", 64)):
            if document.find(b"clip.vision.image_size") is None or name in ("w8a8", "pixtral", "qwen2_5vl", "qwen3vl", "glm4v", "gemma4"):
                document.put(Key(key, 4, u32(side * side)))
        if name == "llava":  # of a tower of one layer
            document.put(Key(b"clip.vision.feature_layer", ARRAY, u32(5) + u64(1) + u32(1)))
        if name == "w8a8":  # of few values, so that the blocks of a row share a scale
            names = [tensor.name for tensor in document.tensors if tensor.kind == Q8_0]
            document.put(Key(b"mbq.row_scale.version", 4, u32(1)))
            document.put(Key(b"mbq.row_scale", ARRAY, strings(names)))
        (SEEDS / "mmproj" / f"{name}.gguf").write_bytes(document.write())


def _few_values(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same shape, so that a file of it takes little room packed."""
    return torch.arange(tensor.numel()).reshape(tensor.shape).remainder(16).sub(7.5).div(64).to(tensor.dtype)


def _repair(document: Document) -> None:
    """Names of tensors that went with their layers leave the list of those with one scale per row."""
    index = document.find(b"mbq.row_scale")
    if index is not None:
        kept = [tensor.name for tensor in document.tensors if tensor.kind in (2, 8) and tensor.name.startswith(b"blk.0.")]
        document.keys[index] = Key(b"mbq.row_scale", ARRAY, strings(kept))


def pictures() -> None:
    """One small picture a format, smooth and with colours."""
    y, x = np.mgrid[0:24, 0:32]
    image = Image.fromarray(np.stack([x * 8, y * 10, 255 - x * 4 - y * 2], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    saves: dict[str, Callable[[Path], object]] = {
        "rgb.png": lambda path: image.save(path),
        "palette.png": lambda path: image.quantize(16).save(path, transparency=3),
        "sixteen.png": lambda path: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path),
        "turned.jpg": lambda path: image.save(path, exif=exif, quality=60),
        "progressive.jpg": lambda path: image.save(path, progressive=True, quality=40),
        "grey.jpg": lambda path: image.convert("L").save(path),
        "lossy.webp": lambda path: image.save(path, quality=30),
        "lossless.webp": lambda path: image.convert("RGBA").save(path, lossless=True, exif=exif),
        "two.webp": lambda path: image.save(path, save_all=True, append_images=[image.rotate(180)], duration=10),
        "two.gif": lambda path: image.save(path, save_all=True, append_images=[image.rotate(180)]),
    }
    for name, save in saves.items():
        save(SEEDS / "picture" / name)


def main() -> None:
    """All seeds anew."""
    for folder in ("text", "mmproj", "picture"):
        (SEEDS / folder).mkdir(parents=True, exist_ok=True)
    pictures()
    ggufs()
    towers()


if __name__ == "__main__":
    main()
