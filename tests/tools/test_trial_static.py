"""tools/trial_static.py: every variant can be made, and a run prints sinks, ranges and scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trial_static
from click.testing import CliRunner
from mbq_gguf.calibration.dataset import load_samples
from mbq_gguf.calibration.magnitudes import Magnitudes
from mbq_gguf.calibration.sinks import Sinks
from mbq_gguf.calibration.stream import capture
from mbq_gguf.models import LoadedModel
from static_variants import OUTLIER, SINK, TEXT, VISION, Variant


def test_a_variant_takes_what_its_classes_hold() -> None:
    counted = {}
    for kind, size in ((TEXT, 1.0), (VISION, 2.0), (SINK, 100.0), (OUTLIER + TEXT, 30.0)):
        counted[0, "o", kind] = Magnitudes()
        counted[0, "o", kind].add(torch.tensor([size]))

    def ranges(variant: Variant) -> list[float]:
        return [variant.range(counted, 0, "o", kind) for kind in (TEXT, VISION, SINK)]

    assert ranges(Variant()) == [0, 0, 0]
    assert ranges(Variant("minmax")) == [100, 100, 100]
    assert ranges(Variant("minmax", two=True)) == [100, 2, 100]
    assert ranges(Variant("minmax", apart=True)) == [30, 30, 0]
    assert ranges(Variant("minmax", two=True, apart=True)) == [30, 2, 0]
    assert ranges(Variant("minmax", apart=True, cleaned=True)) == [2, 2, 0]
    assert ranges(Variant("minmax", two=True, apart=True, cleaned=True)) == [1, 2, 0]


def test_outliers_that_nothing_names_are_a_class_of_their_own(tiny: LoadedModel) -> None:
    (stream,) = capture(tiny, load_samples(None, tiny, 1, 0))
    outlier = torch.zeros(len(stream.ids), dtype=torch.bool)
    outlier[[0, 3]] = True
    kinds = trial_static.classes(stream, Sinks((0,)), outlier)
    assert kinds[0] == SINK
    assert kinds[3] == OUTLIER + int(stream.vision[3])
    assert torch.equal(kinds[4:], stream.vision[4:].long())


def test_what_is_cut() -> None:
    """Three of four values of text lie beyond a range of 1, none of vision's; a dynamic row has no range."""
    counted, found = {}, {}
    for kind, sizes in ((TEXT, [0.5, 2.0, 3.0, 4.0]), (VISION, [0.5, 0.25]), (SINK, [100.0])):
        counted[0, "o", kind], found[0, "o", kind] = Magnitudes(), Magnitudes()
        counted[0, "o", kind].add(torch.tensor([1.0]))
        found[0, "o", kind].add(torch.tensor(sizes))
    assert trial_static.clipped(Variant("minmax", True, True), counted, found) == {"text": 0.75, "vision": 0.0}
    assert trial_static.clipped(Variant(), counted, found) == trial_static.clipped(None, counted, found) == {}


@pytest.mark.parametrize("weights", [[], ["--weights", "W4A8"]], ids=["original", "rounded"])
def test_a_run(weights: list[str], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_static, "VARIANTS", {"full": (Variant(), Variant("minmax", True, True))})
    out = tmp_path / "rows.jsonl"
    command = [str(tiny_dir), "--questions", "1", "--samples", "1", "--synthetic", "0", "--rotate", "full", "--output", str(out)]
    result = CliRunner().invoke(trial_static.main, [*command, *weights])
    assert result.exit_code == 0, result.output
    assert "Sinks(" in result.output
    assert "two ranges, sinks apart, minmax" in result.output
    plain, dynamic, static = [json.loads(line)["scenes"] for line in out.read_text().splitlines()]
    assert plain["kld"] > 1e-5 if weights else plain["kld"] < 1e-5  # of a rotation in float32 nothing is left
    assert dynamic["kld"] != plain["kld"] != static["kld"]
    assert set(static["beyond"]) == {"text", "vision"}
