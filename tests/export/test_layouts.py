"""Checkpoints with any of the names that transformers has used give the same files, and unknown tensors are reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UserError
from mbq_gguf.export.rehearsal import rehearse
from mbq_gguf.models import load
from rich.console import Console
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("built_llama")


def renamed(source: Path, folder: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of the model ``source`` with its tensors renamed; None drops one."""
    model = Path(shutil.copytree(source, folder / "tiny"))  # the directory's name goes into the file
    tensors = {new: tensor for name, tensor in load_file(source / "model.safetensors").items() if (new := rename(name)) is not None}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def newer(name: str) -> str:
    """As a checkpoint is saved without going back to the older names: model.language_model and model.visual."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("options", [{"type": "BF16"}, {"type": "MBQ3S", "method": "rtn", "rounding": "nearest"}])
def test_newer_names_give_the_same_files(options: dict[str, str], tiny_dir: Path, tmp_path: Path) -> None:
    files = []
    for part, rename in (("older", lambda name: name), ("newer", newer)):
        out = tmp_path / f"{part}-out" / "tiny.gguf"
        out.parent.mkdir()
        convert(ConvertOptions(renamed(tiny_dir, tmp_path / part, rename), out, **options), Console(quiet=True))  # type: ignore[arg-type]
        files.append((out.read_bytes(), out.with_name("mmproj-tiny.gguf").read_bytes()))
    assert files[0] == files[1]


def test_a_part_without_tensors(tiny_dir: Path, tmp_path: Path) -> None:
    model = renamed(tiny_dir, tmp_path, lambda name: None if name.startswith("visual.") else name)
    with pytest.raises(UserError, match="finds no tensor of the vision tower"):
        rehearse(model, [model / "model.safetensors"], "F16")


def test_a_tensor_without_a_place(tiny_dir: Path, tmp_path: Path) -> None:
    model = renamed(tiny_dir, tmp_path, lambda name: name.replace("visual.blocks.1.", "tower.vision_blocks.1."))
    with pytest.raises(UserError, match=r"does not support 12 tensors .* tower\.vision_blocks\.1\."):
        rehearse(model, [model / "model.safetensors"], "F16")


def test_a_tokenizer_larger_than_the_embeddings(tiny_dir: Path, tmp_path: Path) -> None:
    model = renamed(tiny_dir, tmp_path, lambda name: name)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"vocab_size in .* is 49152 and the embeddings have 1000 rows"):
        rehearse(model, [model / "model.safetensors"], "F16")
    config = json.loads((model / "config.json").read_text())
    config["text_config"] = {**config.get("text_config", {}), "vocab_size": 1000}
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    with pytest.raises(UserError, match="has 49152 tokens and the embeddings 1000 rows"):
        rehearse(model, [model / "model.safetensors"], "F16")


def test_a_template_in_chat_template_json(tiny_dir: Path, tmp_path: Path) -> None:
    model = renamed(tiny_dir, tmp_path, lambda name: name)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    from mbq_gguf.calibration.dataset import SHIPPED

    picture = SHIPPED.parent / "images" / "0000.png"
    ours, same = (load(folder).encode(picture, [("What?", "blue")]) for folder in (model, tiny_dir))
    assert torch.equal(ours.ids, same.ids)
