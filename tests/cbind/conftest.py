"""The reference VLM in Hugging Face, and as GGUF files in bfloat16 and the MBQ types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_gguf.evaluate.exact_match import SHIPPED, Question, load_questions, stratified
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.models import load
from nearest_files import nearest_weights
from reference_models import Files, HuggingFace
from static_files import Seen, with_keys, write_mmproj, write_plain

QUESTIONS = 18  # one of every task, and one more


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
    loaded.hold(torch.float32)
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
    return nearest_weights(hugging_face.loaded, lambda name: "MBQ3S" if int(name.split(".")[1]) % 2 else "MBQ3")


@pytest.fixture(scope="session")
def mbq3_files(
    reference_dir: Path, bf16_files: Files, mbq3_weights: dict[str, QuantisedTensor], tmp_path_factory: pytest.TempPathFactory
) -> Files:
    text = tmp_path_factory.mktemp("mbq3") / "text.gguf"
    write(reference_dir, text, mbq3_weights)
    return Files(text, bf16_files.mmproj)


@pytest.fixture(scope="session")
def static_plain(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The tiny VLM as W4A8, without static ranges."""
    return write_plain(tiny_dir, tmp_path_factory.mktemp("static") / "plain.gguf").read_bytes()


@pytest.fixture
def static_file(static_plain: bytes, tmp_path: Path) -> Any:
    """Writes that file with the keys that it is given."""

    def write(metadata: dict[str, Any]) -> Path:
        path = tmp_path / "static.gguf"
        path.write_bytes(with_keys(static_plain, metadata))
        return path

    return write


@pytest.fixture(scope="session")
def large_mmproj(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VLM's vision file, which lets pictures have more than 64 tokens."""
    return write_mmproj(tiny_dir, tmp_path_factory.mktemp("mmproj") / "mmproj.gguf")


@pytest.fixture
def seen() -> Seen:
    return Seen()


def write(reference_dir: Path, out: Path, quantised: dict[str, QuantisedTensor]) -> None:
    common = {"replaced": {}, "base_type": "BF16", "embedding_type": "BF16", "metadata": {}, "file_type": None}
    write_text_gguf(reference_dir, out, quantised=quantised, **common)
