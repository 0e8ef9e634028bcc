"""The reference VLM in Hugging Face, and as GGUF files in bfloat16 and the MBQ types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mbq_gguf.evaluate.exact_match import SHIPPED, Question, load_questions, stratified
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models import load
from reference_models import Files, HuggingFace

QUESTIONS = 36  # two of every task, and two more


@pytest.fixture(scope="session", autouse=True)
def _built(built_llama: Path) -> None:
    """Everything here needs the built libraries."""


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return stratified(load_questions(SHIPPED), QUESTIONS)


@pytest.fixture(scope="session")
def hugging_face(reference_dir: Path) -> HuggingFace:
    """The model in float32."""
    loaded = load(reference_dir)
    loaded.model.to(torch.float32)
    return HuggingFace(loaded)


@pytest.fixture(scope="session")
def bf16_files(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("bf16")
    files = Files(folder / "text.gguf", folder / "mmproj.gguf")
    write_mmproj_gguf(reference_dir, files.mmproj, mmproj_type="BF16")
    write(reference_dir, files.text, {})
    return files


@pytest.fixture(scope="session")
def mbq3_weights(hugging_face: HuggingFace) -> dict[str, QuantisedTensor]:
    """Every linear of the decoder rounded to the nearest: MBQ3 in even layers, MBQ3S in odd ones, their _64 where rows need it."""
    quantised = {}
    for key, parameter in hugging_face.loaded.decoder.module.named_parameters():
        if key.startswith("layers.") and parameter.ndim == 2:
            quant_type = quant_type_for("MBQ3S" if int(key.split(".")[1]) % 2 else "MBQ3", parameter.shape[1])
            quantised[key] = QuantisedTensor(quant_type.name, quant_type.quantize(parameter.numpy()), parameter.shape[1])
    return quantised


@pytest.fixture(scope="session")
def mbq3_files(
    reference_dir: Path, bf16_files: Files, mbq3_weights: dict[str, QuantisedTensor], tmp_path_factory: pytest.TempPathFactory
) -> Files:
    text = tmp_path_factory.mktemp("mbq3") / "text.gguf"
    write(reference_dir, text, mbq3_weights)
    return Files(text, bf16_files.mmproj)


def write(reference_dir: Path, out: Path, quantised: dict[str, QuantisedTensor]) -> None:
    common = {"replaced": {}, "base_type": "BF16", "embedding_type": "BF16", "metadata": {}, "file_type": None}
    write_text_gguf(reference_dir, out, quantised=quantised, **common)
