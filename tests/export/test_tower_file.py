"""Vision files with one scale per row: their metadata, how libmtmd runs them, and what it refuses; and rotated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from mbq_gguf.calibration.dataset import FREE_QUESTION, Sample
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.stream import capture_encoded
from mbq_gguf.calibration.tower_ranges import counting
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.errors import UsageError
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mbq_gguf.export.inspect import inspect
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.formats.static_ranges import SITES
from mbq_gguf.model_card import write_card
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.tower import linear
from mbq_gguf.models.towers import find_tower
from mbq_gguf.quantise_tower import TowerSettings, quantise_tower
from mbq_gguf.settings import Activations
from rich.console import Console

Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def text(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertOptions:
    """The language model that every vision file here stands beside, and the plain vision file."""
    options = ConvertOptions(tiny_dir, tmp_path_factory.mktemp("plain") / "plain.gguf", type="BF16", mmproj_type="F32")
    convert(options, Console(quiet=True))
    return options


def features(text: Path, mmproj: Path, gpu_layers: int = 0) -> Floats:
    with Model(text, mmproj, context=128, gpu_layers=gpu_layers) as model:
        return np.concatenate(model.vision.encode(load_questions(SHIPPED)[0].image).embeddings)


def said(table: Any) -> str:
    with (console := Console(width=160)).capture() as captured:
        console.print(table)
    return captured.get()


def moved(found: Floats, plain: Floats) -> float:
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def test_converted_towers(text: ConvertOptions, tiny_dir: Path, tmp_path: Path) -> None:
    """GPTQ on two pictures: 4 bits move the features further than 8, both little; a rotated F16 tower only by rounding to F16."""
    plain, off = features(text.out, text.mmproj), {}
    shapes = [(tensor.name, tensor.shape) for tensor in read_header(text.mmproj).tensors]
    for name, chosen in (("F16", {"rotate_tower": True}), ("W8A8", {}), ("W4A8", {})):
        options = ConvertOptions(tiny_dir, tmp_path / f"{name}.gguf", type="BF16", mmproj_type=name, samples=2, synthetic=0, **chosen)
        convert(options, Console(quiet=True))
        header, off[name] = read_header(options.mmproj), moved(features(text.out, options.mmproj), plain)
        assert [(tensor.name, tensor.shape) for tensor in header.tensors] == shapes  # only tensors change, never the graph
        assert header.metadata.get("mbq.tower.type", "F16") == name
        assert header.metadata["mbq.tower.rotated"] == (name != "W8A8")
        assert ("mbq.act.version" in header.metadata) == (name in row_scale.ROW_SCALES)
        if name in row_scale.ROW_SCALES:
            assert header.lengths["mbq.row_scale"] == 3 * 6 + 2  # q, k, v, out, up and down of three blocks, and the projector's
    assert off["F16"] < 2e-3  # fp16 has 11 bits, over some twenty matrices
    assert off["F16"] < off["W8A8"] < off["W4A8"] < 0.1


def test_static_ranges_are_those_of_the_rounded_tower(tiny_dir: Path, samples: list[Sample]) -> None:
    """The largest input of every site, by the tower as it is afterwards; then by another estimator, which cuts."""
    loaded = load(tiny_dir)
    tower = find_tower(loaded)
    assert tower
    made = quantise_tower(loaded, TowerSettings("W8A8", rotate=False, activations="static", estimator="minmax"), samples[:2]).metadata
    readers = [[linear(block, name) for name in site.readers] for block in tower.blocks for site in tower.layout.sites]
    with counting(readers) as found, torch.no_grad(), coarse_products(loaded.device):
        for sample in dict.fromkeys(sample.image for sample in samples[:2]):
            capture_encoded(loaded, loaded.encode(sample, [(FREE_QUESTION, "")]))
    largest = np.array([site.magnitudes.largest for site in found]).reshape(3, 4)
    ranges = np.array([made[f"mbq.act.range.{site}.vision"] for site in SITES]).T
    assert np.array_equal(ranges, largest)
    settings = TowerSettings("W8A8", rotate=False, activations="static", estimator="p99.9")
    cut = quantise_tower(load(tiny_dir), settings, samples[:2]).metadata
    assert cut["mbq.act.estimator"] == "p99.9"
    few = np.array([cut[f"mbq.act.range.{site}.vision"] for site in SITES]).T
    assert (few <= ranges).all()
    assert ((few > 0) & (few < ranges)).any()


def test_static_towers_answer_nearly_as_dynamic_ones(text: ConvertOptions, tiny_dir: Path, tmp_path: Path) -> None:
    """And the report, inspect and the card say which they are."""
    plain, off = features(text.out, text.mmproj), {}
    kinds: tuple[Activations, ...] = ("dynamic", "static")
    for activations in kinds:
        out = tmp_path / f"{activations}.gguf"
        options = ConvertOptions(tiny_dir, out, type="BF16", mmproj_type="W8A8", samples=2, synthetic=0, mmproj_activations=activations)
        report = convert(options, Console(quiet=True))
        off[activations] = moved(features(text.out, options.mmproj), plain)
        static = activations == "static"
        assert ("static scales of the tower's activations (p99.99)" in said(report.render())) == static
        assert ("gate_up.vision" in said(inspect(options.mmproj))) == static
        card = write_card(out, None).read_text()
        assert "| vision file: tower.type | W8A8 |" in card
        assert ("| vision file: act.estimator | p99.99 |" in card) == static
    print(f"features moved by {off['dynamic']:.4f} and {off['static']:.4f}")
    assert off["static"] != off["dynamic"]
    assert off["static"] < 1.5 * off["dynamic"]  # activations' errors are 1.2 to 2 times as large; measured: 0.0020 both


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"mmproj_type": "F16", "mmproj_activations": "dynamic"}, "also give --mmproj-type W8A8 or W4A8, or leave it out"),
        ({"mmproj_type": "Q8_0", "mmproj_activations": "static"}, "also give --mmproj-type W8A8 or W4A8, or leave it out"),
        ({"mmproj_type": "W8A8", "mmproj_activations": "static", "rounding": "nearest"}, "are measured while GPTQ rounds it"),
    ],
)
def test_ranges_of_a_tower_that_would_change_nothing_are_refused(chosen: dict[str, Any], why: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why):
        convert(ConvertOptions(tiny_dir, tmp_path / "out.gguf", type="BF16", **chosen), Console(quiet=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["F16", "W8A8", "W4A8"])
def test_towers_on_a_card(name: str, text: ConvertOptions, tiny_dir: Path, tmp_path: Path) -> None:
    """CUDA gives what the CPU does, up to its attention and, in F16, its sums in F16; products with one scale per row are the same bits."""
    options = ConvertOptions(tiny_dir, tmp_path / f"{name}.gguf", type="BF16", mmproj_type=name, rounding="nearest")
    convert(options, Console(quiet=True))
    assert moved(features(text.out, options.mmproj, -1), features(text.out, options.mmproj)) < 0.01


@pytest.fixture(scope="module")
def matrices(tiny: LoadedModel) -> dict[str, QuantisedTensor]:
    """The first block's output matrix of attention in W8A8."""
    tower = find_tower(tiny)
    assert tower
    weight = linear(tower.blocks[0], "attn.proj").weight.detach()
    kept = quant_type_for("W8A8", weight.shape[1])
    return {"blocks.0.attn.proj.weight": QuantisedTensor(kept.name, kept.quantize(weight.float().numpy()), weight.shape[1])}


def test_libmtmd_takes_the_other_product(
    text: ConvertOptions, matrices: dict[str, QuantisedTensor], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its key the file runs by other sums than without, and gives nearly the same: both round activations to 8 bits."""
    write_mmproj_gguf(tiny_dir, tmp_path / "flagged.gguf", mmproj_type="W8A8", quantised=matrices)
    monkeypatch.setattr(row_scale, "metadata", lambda tensors: {})
    write_mmproj_gguf(tiny_dir, tmp_path / "plain.gguf", mmproj_type="W8A8", quantised=matrices)
    flagged, plain = features(text.out, tmp_path / "flagged.gguf"), features(text.out, tmp_path / "plain.gguf")
    assert not np.array_equal(flagged, plain)
    assert moved(flagged, plain) < 0.01


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mbq.row_scale": ["v.blk.0.attn_x.weight"]}, "holds no such tensor"),
        ({"mbq.row_scale": ["v.blk.0.ln1.weight"]}, "must be Q4_0 or Q8_0 and is f32"),
        ({"mbq.row_scale": [1, 2]}, "must be an array of strings"),
        ({"mbq.row_scale.version": 2}, "is 2: this program knows 1"),
        ({"mbq.row_scale.version": "1"}, "must be a u32"),
    ],
)
def test_wrong_keys_are_refused(
    changed: dict[str, Any],
    sentence: str,
    text: ConvertOptions,
    matrices: dict[str, QuantisedTensor],
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {**row_scale.metadata(["v.blk.0.attn_out.weight"]), **changed}
    monkeypatch.setattr(row_scale, "metadata", lambda tensors: keys)
    write_mmproj_gguf(tiny_dir, tmp_path / "tiny.gguf", mmproj_type="W8A8", quantised=matrices)
    with pytest.raises(BindingError, match=sentence), Model(text.out, tmp_path / "tiny.gguf", context=128) as model:
        assert model.vision
