"""tools/trial_static.py: every variant can be made, and a run prints sinks, ranges and scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trial_static
from click.testing import CliRunner
from mbq_gguf.calibration.magnitudes import Magnitudes
from trial_static import SINK, TEXT, VISION, Variant


def test_a_variant_takes_what_its_classes_hold() -> None:
    counted = {}
    for kind, size in ((TEXT, 1.0), (VISION, 2.0), (SINK, 100.0)):
        counted[0, "o", kind] = Magnitudes()
        counted[0, "o", kind].add(torch.tensor([size]))

    def ranges(variant: Variant) -> list[float]:
        return [variant.range(counted, 0, "o", kind) for kind in (TEXT, VISION, SINK)]

    assert ranges(Variant()) == [0, 0, 0]
    assert ranges(Variant("minmax")) == [100, 100, 100]
    assert ranges(Variant("minmax", two=True)) == [100, 2, 100]
    assert ranges(Variant("minmax", apart=True)) == [2, 2, 0]
    assert ranges(Variant("minmax", two=True, apart=True)) == [1, 2, 0]


def test_a_run(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_static, "VARIANTS", {"full": (Variant(), Variant("minmax", True, True))})
    command = [str(tiny_dir), "--questions", "1", "--samples", "1", "--rotate", "full"]
    result = CliRunner().invoke(trial_static.main, command)
    assert result.exit_code == 0, result.output
    assert "Sinks(" in result.output
    assert "two ranges, sinks apart, minmax" in result.output
