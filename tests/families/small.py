"""A family's small checkpoint, its model in Hugging Face, and its files in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import capture_encoded
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.formats.row_scale import stored_as
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.prompts import Encoded
from mbq_gguf.outcome import QuantiseResult
from PIL import Image
from recipe import Recipe, write
from recipes import RECIPES

DECIDED = 0.7  # of the tokens at least whose top-1 may be asked for; measured: 0.75
QUESTION = "What is in this picture?"
ANSWER = " ".join(["red", "blue circle", "left of", "the square", "seven"] * 4)


class Small:
    """Everything that the tests of one family share; files are made when they are asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.recipe: Recipe = RECIPES[name]

    @cached_property
    def directory(self) -> Path:
        """The checkpoint as transformers saves it."""
        return write(self.recipe, self.folder / "checkpoint")

    @cached_property
    def picture(self) -> Path:
        path, (width, height) = self.folder / "picture.png", self.recipe.size
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        return path

    @cached_property
    def loaded(self) -> LoadedModel:
        """In float32, layers too."""
        loaded = load(self.directory)
        loaded.hold(torch.float32)
        return loaded

    @property
    def samples(self) -> list[Sample]:
        """What calibration takes: one conversation."""
        return [Sample(self.picture, ((QUESTION, ANSWER),))]

    @cached_property
    def encoded(self) -> Encoded:
        """The conversation as calibration sees it."""
        return self.loaded.encode(self.picture, [(QUESTION, ANSWER)])

    @property
    def picture_ids(self) -> set[int]:
        """Tokens that stand where the runtime puts embeddings of a picture."""
        return set(self.loaded.prompts.image_prompt.picture_ids)

    @cached_property
    def mmproj(self) -> Path:
        path = self.folder / "mmproj.gguf"
        write_mmproj_gguf(self.directory, path, mmproj_type="BF16")
        return path

    @cached_property
    def exact_mmproj(self) -> Path:
        """In float32."""
        path = self.folder / "mmproj-exact.gguf"
        write_mmproj_gguf(self.directory, path, mmproj_type="F32")
        return path

    def written(
        self, name: str, result: QuantiseResult | None = None, directory: Path | None = None, base_type: str = "BF16"
    ) -> tuple[Path, Path]:
        """The two files of ``result``, what it has not quantised in ``base_type``."""
        path, mmproj = self.folder / f"{name}.gguf", self.mmproj
        result = result or QuantiseResult()
        if vision := result.tensors_of("vision"):
            mmproj = self.folder / f"mmproj-{name}.gguf"
            write_mmproj_gguf(self.directory, mmproj, mmproj_type="BF16", replaced=vision, metadata=result.facts_of("vision"))
        write_text_gguf(
            directory or self.directory,
            path,
            quantised=result.quantised,
            replaced=result.replaced,
            base_type=base_type,
            embedding_type=base_type,
            metadata=result.facts_of("metadata"),
            file_type=None,
        )
        return path, mmproj

    @contextmanager
    def rounded_inputs(self, names: Iterable[str], block: int | None) -> Iterator[None]:
        """Within the block, inputs of these decoder weights are rounded to int8, ``block`` channels to a scale (None: all of a token)."""

        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            blocks = inputs[0].unflatten(-1, (-1, block or inputs[0].shape[-1]))
            step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
            return (((blocks / step).round() * step).flatten(-2),)

        modules = dict(self.loaded.decoder.module.named_modules())
        handles = [modules[name.removesuffix(".weight")].register_forward_pre_hook(hook) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def all_chosen(self) -> Iterator[Path]:
        """Within the block each token goes to all experts, in the model and in the checkpoint that is given; without experts, as ever."""
        routers = [module for module in self.loaded.decoder.module.modules() if hasattr(module, "top_k")]
        setting = "num_experts_per_tok" if routers else "top_k_experts"
        if not self.loaded.decoder.layout.stacks:
            yield self.directory
            return
        text = self.loaded.config.text_config  # which Gemma 4's routers ask
        folder, settings = self.folder / "all-chosen", self.recipe.config["text_config"]
        experts = settings.get("num_experts") or settings["num_local_experts"]
        if not folder.is_dir():
            folder.mkdir()
            for file in self.directory.iterdir():
                if file.name != "config.json":
                    (folder / file.name).symlink_to(file)
            config = json.loads((self.directory / "config.json").read_text())
            config["text_config"][setting] = experts
            (folder / "config.json").write_text(json.dumps(config))
        kept = getattr(text, setting)
        try:
            setattr(text, setting, experts)
            for router in routers:
                router.top_k = experts
            yield folder
        finally:
            setattr(text, setting, kept)
            for router in routers:
                router.top_k = kept

    def theirs(self, weights: Mapping[str, Any] | None = None) -> Floats:
        """Hugging Face's logits of the answer's tokens, with decoder ``weights`` in place of its own."""
        answer = int(self.encoded.answer.sum())
        path = self.loaded.decoder.path
        changed = {f"{path}.{name}": torch.as_tensor(value).float() for name, value in (weights or {}).items()}
        inputs = {**self.encoded.inputs, "logits_to_keep": answer + 1}
        with torch.inference_mode():
            out: Any = torch.func.functional_call(self.loaded.model, changed, (), inputs)
        logits: Floats = out.logits[0, -answer - 1 : -1].numpy()  # of all tokens, where a model knows no logits_to_keep
        return logits

    def ours(self, files: tuple[Path, Path]) -> Floats:
        """llama.cpp's, after its own picture and prompt."""
        answer = self.encoded.ids[self.encoded.answer].tolist()
        with Model(*files, context=512, threads=1) as model:
            return model.logits(model.prompt(QUESTION), [model.vision.encode(self.picture)], answer)

    def features(self) -> Floats:
        """What Hugging Face's tower puts in the place of the picture [picture tokens, width]."""
        stream = capture_encoded(self.loaded, self.loaded.encode(self.picture, [(QUESTION, "")]))
        features: Floats = stream.hidden[0, stream.vision].numpy()
        return features

    def our_features(self) -> Floats:
        """What libmtmd's does in float32, without what it adds to layers further on."""
        with Model(self.written("features")[0], self.exact_mmproj, context=512, threads=1) as model:
            return np.concatenate(model.vision.encode(self.picture).embeddings)[:, : self.loaded.decoder.head.in_features]


def moved(ours: Floats, theirs: Floats) -> float:
    """The difference as a share of ``theirs``, in root mean square."""
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    print(f"features moved by {difference:.4f}")
    return difference


def unpacked(result: QuantiseResult) -> dict[str, Any]:
    """The weights that ``result`` stores, by their names in the decoder, with what else it replaces."""
    weights = {name: quant_type(stored_as(found.type_name)).dequantize(found.data) for name, found in result.quantised.items()}
    return {**weights, **result.replaced}


def compare(ours: Floats, theirs: Floats, lead: float = 0.0) -> tuple[float, float]:
    """Share of tokens with the same top-1, of those that ``theirs`` decides by ``lead`` or more, and the largest difference. Both are
    shares of the range of ``theirs``."""
    second, first = np.sort(theirs, axis=-1)[:, -2:].T
    decided = first - second >= lead * np.ptp(theirs)
    assert decided.mean() >= DECIDED, "where most tokens are ties the others say nothing"
    top1 = float((ours.argmax(-1) == theirs.argmax(-1))[decided].mean())
    difference = float(np.abs(ours - theirs).max() / np.ptp(theirs))
    print(f"top-1 equal {top1:.3f} of {decided.mean():.2f} of the tokens, largest difference {difference:.4f} of the range")
    return top1, difference
