"""A whole conversion of a tiny VLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from io import StringIO
from pathlib import Path

import pytest
from mbq_gguf import convert as pipeline
from mbq_gguf.cli import convert as command
from mbq_gguf.convert import ConvertOptions, ConvertReport, convert
from mbq_gguf.errors import UserError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.metadata import file_type
from mbq_gguf.export.report import duration, megabytes
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.quantise import QuantiseResult, quantise
from rich.console import Console
from safetensors.torch import load_file

RTN = {"method": "rtn", "rounding": "nearest"}
LAYERS = 3  # of the tiny VLM


def run(model_dir: Path, out: Path, **options: object) -> tuple[ConvertReport, str]:
    """Convert and return the report and all that was printed."""
    console = Console(file=StringIO(), width=140)
    report = convert(ConvertOptions(model_dir, out, **options), console)
    console.print(report.render())
    return report, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_commands_defaults_are_the_options() -> None:
    given = {"type" if option.name == "type_" else option.name: option.default for option in command.params}
    checked = {field.name for field in fields(ConvertOptions) if field.default is not None and field.default is not MISSING}
    assert {"samples", "synthetic", "error_correction", "type"} <= checked
    for field in fields(ConvertOptions):
        if field.name in checked:
            assert given[field.name] == field.default, field.name


@pytest.fixture(scope="module")
def rtn(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConvertReport, str]:
    """The tiny VLM rounded to the nearest."""
    return run(tiny_dir, tmp_path_factory.mktemp("rtn") / "tiny.gguf", **RTN)


def test_both_files_and_nothing_else_are_there(rtn: tuple[ConvertReport, str]) -> None:
    report, _ = rtn
    assert sorted(path.name for path in report.out.parent.iterdir()) == ["mmproj-tiny.gguf", "tiny.gguf"]
    assert report.mmproj == report.out.with_name("mmproj-tiny.gguf")


def test_linears_are_the_types_own_rounding(rtn: tuple[ConvertReport, str], tiny_dir: Path) -> None:
    report, _ = rtn
    header, content = read_header(report.out), report.out.read_bytes()
    weights = load_file(tiny_dir / "model.safetensors")
    for name, source, kind in (
        ("blk.0.attn_q.weight", "self_attn.q_proj", "MBQ3S"),
        ("blk.0.ffn_up.weight", "mlp.up_proj", "MBQ3S"),
        ("blk.0.ffn_down.weight", "mlp.down_proj", "MBQ3S_64"),  # rows of 192 = 3 x 64
    ):
        entry = next(tensor for tensor in header.tensors if tensor.name == name)
        assert entry.type_name == kind
        expected = quant_type(kind).quantize(weights[f"model.layers.0.{source}.weight"].float().numpy())
        assert content[header.data_start + entry.offset :][: entry.nbytes] == expected.tobytes()


def test_metadata_say_how_it_was_made(rtn: tuple[ConvertReport, str]) -> None:
    found = read_header(rtn[0].out).metadata
    expected = {"mbq.version": 1, "mbq.type": "MBQ3S", "mbq.method": "rtn", "mbq.rounding": "nearest", "mbq.calibration.samples": 0}
    assert {key: found[key] for key in expected} == expected
    assert found["general.file_type"] == 122
    assert "mbq.calibration.fingerprint" not in found


@pytest.mark.parametrize(("ratio", "words"), [(2, "2.00 times smaller"), (1, "1.00 times smaller"), (0.5, "2.00 times larger")])
def test_files_that_grew_are_not_called_smaller(ratio: float, words: str, rtn: tuple[ConvertReport, str]) -> None:
    console = Console(file=StringIO(), width=140)
    console.print(replace(rtn[0], size_before=round(rtn[0].size_after * ratio)).render())
    assert f"after: {words}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_report_lists_sizes_and_fallbacks(rtn: tuple[ConvertReport, str]) -> None:
    report, text = rtn
    assert "note: 3 tensors with rows of 192 weights: stored as MBQ3S_64, since no block of MBQ3S fits" in text
    assert report.size_after == sum(path.stat().st_size for path in report.out.parent.iterdir())
    assert f"{megabytes(report.size_before)} before, {megabytes(report.size_after)} after" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["MBQ3S", "18", "294,912", "119.8", "kB", "3.250"] in rows
    assert ["MBQ3S_64", "3", "73,728", "32.3", "kB", "3.500"] in rows
    assert "drawn scenes" not in text  # nothing was calibrated


def test_reference_type_calibrates_nothing(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    report, _ = run(tiny_dir, tmp_path / "tiny.gguf", type="BF16", mmproj_type="BF16")
    header = read_header(report.out)
    assert header.metadata["general.file_type"] == 32
    assert not any(key.startswith("mbq.") for key in header.metadata)
    assert {tensor.type_name for tensor in header.tensors} == {"BF16", "F32"}
    assert {tensor.type_name for tensor in read_header(report.mmproj).tensors} == {"BF16", "F32"}


@pytest.mark.parametrize(("kind", "number"), [("Q4_0", 2), ("Q4_K", 14), ("MBQ3_64", 121)])
def test_other_types(kind: str, number: int, built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    report, _ = run(tiny_dir, tmp_path / "tiny.gguf", type=kind.lower(), **RTN)
    header = read_header(report.out)
    assert header.metadata["general.file_type"] == number == file_type(kind)
    stored = {tensor.type_name for tensor in header.tensors if tensor.name.endswith("attn_q.weight")}
    assert stored == {"Q5_0" if kind == "Q4_K" else kind}  # 128 columns hold no K-quant's block of 256


def test_calibrated_file_holds_ratios_and_fingerprint(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    report, text = run(tiny_dir, tmp_path / "tiny.gguf", method="mbq", samples=1, synthetic=2)
    found = read_header(report.out).metadata
    assert found["mbq.gptq.clip"] is True
    assert (found["mbq.gptq.distort"], found["mbq.gptq.correction"], found["mbq.gptq.refits"]) == (True, 0.5, 2)
    assert (found["mbq.method"], found["mbq.rounding"]) == ("mbq", "gptq")
    assert (found["mbq.calibration.samples"], found["mbq.calibration.synthetic"]) == (1, 2)
    assert len(found["mbq.ratio.attention"]) == len(found["mbq.ratio.mlp"]) == LAYERS
    assert all(ratio > 0 for ratio in found["mbq.ratio.attention"] + found["mbq.ratio.mlp"])
    assert len(found["mbq.calibration.fingerprint"]) == 64
    assert "drawn scenes that come with mbq-gguf" in text
    for stage in ("sensitivity", "layers", "write GGUF"):
        assert stage in text


def test_types_that_gptq_cannot_fill_are_named(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    sentence = "tensors in IQ4_NL: rounded to nearest"
    assert f"21 {sentence}" in run(tiny_dir, tmp_path / "tiny.gguf", type="IQ3_S", method="rtn", samples=1, synthetic=0)[1]
    assert sentence not in run(tiny_dir, tmp_path / "tiny.gguf", type="IQ4_NL", **RTN)[1]
    assert "rounded to nearest" not in run(tiny_dir, tmp_path / "tiny.gguf", type="Q3_K", method="rtn", samples=1, synthetic=0)[1]


def test_target_size_is_met_by_a_mixed_file(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    report, text = run(tiny_dir, tmp_path / "tiny.gguf", target_bpw=4.5, samples=2, synthetic=0, **RTN)
    header = read_header(report.out)
    linears = [tensor for tensor in header.tensors if ".attn_" in tensor.name or ".ffn_" in tensor.name]
    linears = [tensor for tensor in linears if tensor.name.endswith("weight") and "norm" not in tensor.name]
    found = header.metadata
    weights = LAYERS * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192)
    assert found["mbq.allocation.bits_per_weight"] == pytest.approx(8 * sum(tensor.nbytes for tensor in linears) / weights)
    assert 4.4 < found["mbq.allocation.bits_per_weight"] <= 4.5
    assert found["mbq.type"] == "mixed"
    # Rounding to nearest without equalisation is what was predicted, but for the rows that the prediction leaves out: measured 1.016.
    assert found["mbq.allocation.measured_loss"] == pytest.approx(found["mbq.allocation.predicted_loss"], rel=0.05)
    assert "predicted nats" in text
    assert "note:" not in text


Progress = Callable[[str, int, int], None]


def interrupting(after: int) -> Callable[..., QuantiseResult]:
    """quantise, stopped by Ctrl-C after ``after`` layers."""

    def run_until(
        loaded: object, samples: object, settings: object, work: object, progress: Callable[[str, int, int], None]
    ) -> QuantiseResult:
        def stop(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            if stage == "layers" and done == after:
                raise KeyboardInterrupt

        return quantise(loaded, samples, settings, work, stop)  # type: ignore[arg-type]

    return run_until


def test_stopped_run_goes_on_and_ends_alike(
    rtn: tuple[ConvertReport, str], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantise", interrupting(after=2))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_dir, out, **RTN)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf.work"]
    finished = sorted(path.name for path in tmp_path.rglob("layer-*.safetensors"))
    assert finished == ["layer-0000.safetensors", "layer-0001.safetensors"]
    run(tiny_dir, out, **RTN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmproj-tiny.gguf", "tiny.gguf"]
    assert out.read_bytes() == rtn[0].out.read_bytes()


def test_run_that_failed_early_leaves_nothing(built_llama: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> QuantiseResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantise", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_dir, tmp_path / "tiny.gguf", **RTN)
    assert not list(tmp_path.iterdir())


def test_work_directory_of_ones_own_is_kept(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    run(tiny_dir, tmp_path / "tiny.gguf", work_dir=tmp_path / "work", **RTN)
    assert len(list((tmp_path / "work").glob("layer-*.safetensors"))) == LAYERS


def test_files_beside_the_model_are_none_of_its_own(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """A second run into the model's own folder goes on with the layers of the first."""
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    run(model, model / "out.gguf", samples=2, synthetic=0, work_dir=tmp_path / "work")
    (model / "README.md").write_text("a card")
    layers = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("layer-*")}
    assert len(layers) == LAYERS
    run(model, model / "out.gguf", samples=2, synthetic=0, work_dir=tmp_path / "work")
    assert layers == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("layer-*")}


@pytest.mark.parametrize("options", [RTN, {"type": "BF16"}])
def test_a_model_that_changes_meanwhile(options: dict[str, object], built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))

    def change(stage: str, done: int, total: int) -> None:
        if stage == "write GGUF":
            os.utime(model / "model.safetensors")

    with pytest.raises(UserError, match="model were changed while it was converted"):
        convert(ConvertOptions(model, tmp_path / "out.gguf", **options), Console(file=StringIO()), change)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.gguf"))


def test_durations_and_sizes_are_readable() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.0, 61.2, 3 * 3600 + 125)] == ["0.4 s", "59.0 s", "1 min 1 s", "3 h 2 min"]
    assert [megabytes(size) for size in (1500, 2_500_000, 3_210_000_000)] == ["1.5 kB", "2.5 MB", "3.21 GB"]
