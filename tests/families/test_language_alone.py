"""A language model whose tower llama.cpp does not support, converted alone. Takes about five seconds of processor time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.dry_run import dry_run
from mbq_gguf.errors import UsageError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_text_gguf
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.language_only import language_only_mode
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from recipe import write
from recipes import RECIPES
from rich.console import Console
from small import compare, unpacked

TEXT = "seven of the blue circles are left of the square, and the others are red"
BF16 = 0.03  # of the range of the logits, as for families
INT8 = 0.04  # Q8_0 by rounding to nearest, as for families
QUANTISED = 0.05  # activations rounded to int8 in blocks of 32; measured: 0.0095


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VipLlava: LLaVA-1.5's parts, and a projector that joins the features of several of the tower's layers."""
    recipe = RECIPES["LLaVA-1.5"]
    settings: dict[str, Any] = {**recipe.__dict__, "model_type": "vipllava"}
    return write(type(recipe)(**settings), tmp_path_factory.mktemp("alone") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    with language_only_mode(True):
        found = load(checkpoint)
    found.hold(torch.float32)
    return found


def options(checkpoint: Path, folder: Path, **changes: Any) -> ConvertOptions:
    return ConvertOptions(checkpoint, folder / "out.gguf", **{"language_model_only": True, "synthetic": 4, **changes})


def ours(file: Path, ids: list[int]) -> Floats:
    with Model(file, context=512, threads=1) as model:
        assert model.tokenize(TEXT) == ids
        return model.logits(model.text(ids[:1]), [], ids[1:])


@torch.inference_mode()
def theirs(loaded: LoadedModel, ids: list[int], weights: dict[str, Any]) -> Floats:
    changed = {f"{loaded.decoder.path}.{name}": torch.as_tensor(value).float() for name, value in weights.items()}
    out: Any = torch.func.functional_call(loaded.model, changed, (), {"input_ids": torch.tensor([ids])})
    logits: Floats = out.logits[0, :-1].numpy()
    return logits


def test_a_conversion_gives_one_file_with_hugging_faces_logits(checkpoint: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    chosen = options(checkpoint, tmp_path, type="BF16")
    report = convert(chosen, Console(quiet=True))
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert report.mmproj is None
    ids = loaded.prompts.tokenizer(TEXT)["input_ids"]
    top1, difference = compare(ours(chosen.out, ids), theirs(loaded, ids, {}))
    assert top1 >= 0.9
    assert difference <= BF16


def test_quantised_is_hugging_face_with_those_weights(checkpoint: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    result = quantise(loaded, [], QuantiseSettings(synthetic=4, pictures=False, refits=0, clip=False))
    assert len(result.quantised) == len(list(loaded.decoder.linears()))
    file = tmp_path / "out.gguf"
    content = {"quantised": result.quantised, "replaced": result.replaced, "metadata": result.facts_of("metadata")}
    write_text_gguf(checkpoint, file, **content, base_type="BF16", embedding_type="BF16", file_type=None)
    ids = loaded.prompts.tokenizer(TEXT)["input_ids"]
    _, difference = compare(ours(file, ids), theirs(loaded, ids, unpacked(result)))
    assert difference <= QUANTISED


def test_rotated_is_hugging_faces(checkpoint: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """Fully, as W4A8 is unless told: no picture comes into its residual stream."""
    asked = options(checkpoint, tmp_path, type="W4A8").with_rotation(loaded).rotate
    assert asked == "full"
    result = quantise(loaded, [], QuantiseSettings(type_name="Q8_0", rounding="nearest", rotate=asked, synthetic=4, pictures=False))
    file = tmp_path / "out.gguf"
    content = {"quantised": result.quantised, "replaced": result.replaced, "metadata": result.facts_of("metadata")}
    write_text_gguf(checkpoint, file, **content, base_type="BF16", embedding_type="BF16", file_type=None)
    ids = loaded.prompts.tokenizer(TEXT)["input_ids"]
    _, difference = compare(ours(file, ids), theirs(loaded, ids, {}))
    assert difference <= INT8


def test_the_file_and_the_report_say_what_it_saw(checkpoint: Path, tmp_path: Path) -> None:
    chosen = options(checkpoint, tmp_path, type="Q4_0", refits=0)
    report = convert(chosen, Console(quiet=True))
    assert report.calibration == "calibrated only on 4 texts that the model generated: it has seen no picture tokens"
    assert read_header(chosen.out).metadata["mbq.calibration.synthetic"] == 4
    (tmp_path / "dry").mkdir()
    expected = dry_run(options(checkpoint, tmp_path / "dry", type="Q4_0"), Console(quiet=True))
    assert expected.report.mmproj is None
    assert expected.mmproj_bytes == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"language_model_only": False}, "or give --language-model-only"),
        ({"calib": Path("pictures")}, "takes no pictures"),
        ({"mmproj_type": "W8A8"}, "writes no tower"),
        ({"mmproj_activations": "static"}, "writes no tower.*--mmproj-activations"),
        ({"method": "mbq"}, "leave out --target-bpw, --method"),
        ({"synthetic": 0}, "give --synthetic 1 or more"),
    ],
)
def test_what_it_cannot_do_is_refused(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        convert(options(checkpoint, tmp_path, **changes), Console(quiet=True))
