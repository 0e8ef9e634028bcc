"""A file with static ranges of activations: its metadata, and the output of `inspect` and the report."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from mbq_gguf import quantise as walk
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.magnitudes import Estimator
from mbq_gguf.calibration.sinks import Sinks
from mbq_gguf.convert import ConvertOptions, ConvertReport, convert
from mbq_gguf.errors import UsageError
from mbq_gguf.export.gguf_header import Header, read_header
from mbq_gguf.export.inspect import inspect
from mbq_gguf.models import LoadedModel
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from rich.console import Console

SITES = ("qkv", "o", "gate_up", "down")
OPTIONS = {"type": "W4A8", "rounding": "nearest", "samples": 2, "synthetic": 0, "threads": 1}


def run(tiny_dir: Path, out: Path, **options: object) -> tuple[ConvertReport, Header]:
    report = convert(ConvertOptions(tiny_dir, out, **OPTIONS, **options), Console(file=StringIO()))  # type: ignore[arg-type]
    return report, read_header(report.out)


def said(*tables: object) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(*tables)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_file_the_report_and_inspect_tell_of_it(
    built_llama: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_gguf.walk.before.find_sinks", lambda *_: Sinks((0, 1), (7,)))
    report, header = run(tiny_dir, tmp_path / "static.gguf", activations="static")
    keys = {key: value for key, value in header.metadata.items() if key.startswith("mbq.act.")}
    assert (keys.pop("mbq.act.version"), keys.pop("mbq.act.estimator")) == (1, ConvertOptions.range_estimator)
    assert (keys.pop("mbq.act.sink.positions"), keys.pop("mbq.act.sink.tokens")) == ([0, 1], [7])
    assert "99.9th percentile" in str(keys.pop("mbq.act.sink.rule"))
    assert set(keys) == {f"mbq.act.range.{site}.{kind}" for site in SITES for kind in ("text", "vision")}
    assert all(len(values) == 3 and min(values) > 0 for values in keys.values())  # type: ignore[arg-type, type-var]
    assert "dynamic at positions 0, 1 and tokens 7" in said(report.render())
    shown = said(inspect(report.out))
    assert "static ranges of activations, first layer to last" in shown
    assert "gate_up.vision" in shown


def test_ranges_are_those_of_the_rounded_model(tiny: LoadedModel, samples: list[Sample]) -> None:
    """Two types round the first o_proj differently, and gate_up behind it sees that."""
    found = []
    for kind in ("W4A8", "W8A8"):
        result = quantise(tiny, samples[:1], QuantiseSettings(kind, synthetic=0, refits=0, activations="static"))
        found.append(result.facts_of("metadata")["mbq.act.range.gate_up.vision"])
    assert found[0] == pytest.approx(found[1], rel=0.5)
    assert all(four != eight for four, eight in zip(*found, strict=True))


@pytest.mark.parametrize("type_", ["MBQ3S", "Q4_0"])
def test_other_types_take_no_static_scales(type_: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one scale per row"):
        convert(ConvertOptions(tiny_dir, tmp_path / "out.gguf", type=type_, activations="static"), Console(file=StringIO()))


def test_the_step_runs_for_static_ranges_alone() -> None:
    names = [step.__name__ for step in (*walk.BEFORE, *walk.LAYER)]
    assert names.index("measure_sinks") < names.index("draw_rotation")  # sinks show before a rotation spreads them
    assert names.index("keep_parameters") < names.index("measure_ranges")


def test_the_estimator_reaches_the_file(tiny: LoadedModel, samples: list[Sample]) -> None:
    """A percentile lies at or below the largest value, and below it somewhere."""
    found = {}
    estimators: tuple[Estimator, ...] = ("minmax", "p99.9")
    for estimator in estimators:
        settings = QuantiseSettings("W8A8", rounding="nearest", synthetic=0, activations="static", range_estimator=estimator)
        found[estimator] = quantise(tiny, samples[:1], settings).facts_of("metadata")
        assert found[estimator]["mbq.act.estimator"] == estimator
    for site in SITES:
        key = f"mbq.act.range.{site}.vision"
        assert all(0 < cut <= whole for cut, whole in zip(found["p99.9"][key], found["minmax"][key], strict=True))
    assert found["p99.9"] != found["minmax"] | {"mbq.act.estimator": "p99.9"}


def test_an_estimator_without_static_ranges_is_refused(tiny: LoadedModel, samples: list[Sample]) -> None:
    with pytest.raises(UsageError, match="--range-estimator is for static ranges: also give --activations static"):
        quantise(tiny, samples[:1], QuantiseSettings("W8A8", range_estimator="p99.9"))
