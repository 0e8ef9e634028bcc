"""tools/trial_quality.py: a trial of the tiny VLM, and its output for a result that changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import trial_quality as trial
from click.testing import CliRunner
from mbq_gguf.calibration.dataset import SHIPPED
from mbq_gguf.models import LoadedModel
from mbq_gguf.outcome import QuantiseResult
from mbq_gguf.transforms.rotation import draw, rotate_layer


def test_variants_are_settings() -> None:
    variant = trial.parsed("samples=32,seed=1,type_name=Q4_0,clip=False,error_correction=0.25")
    assert (variant.samples, variant.seed) == (32, 1)
    assert (variant.settings.type_name, variant.settings.clip, variant.settings.error_correction) == ("Q4_0", False, 0.25)
    assert trial.parsed("").name == "default"


def test_rotation_alone_changes_no_answer(tiny: LoadedModel) -> None:
    """Rotated weights, unrounded, give the original's log-probabilities to 1e-3."""
    streams = trial.scenes(tiny, 2)
    plain = trial.answer_logits(tiny, streams, None, "none")
    rotation = draw(tiny.decoder, "full", trial.ROTATION_SEED)
    result = QuantiseResult()
    for index in range(len(tiny.decoder.layers)):
        layer = trial.working_layer(tiny, index)
        rotate_layer(layer, rotation)
        for name, value in layer.module.named_parameters():
            result.put("replaced", f"layers.{index}.{name}", value)
    for ours, theirs in zip(trial.answer_logits(tiny, streams, result, "full"), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_a_trial_of_the_tiny_model(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copy(SHIPPED.parent / "images" / "0000.png", tmp_path / "a.png")
    line = {"image": "a.png", "turns": [{"question": "What is this?"}]}
    (tmp_path / "photographs.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "text.txt").write_text("Small files read, count and point. " * 60)
    variant = "samples=1,synthetic=0,refits=0,clip=False"
    options = ["--questions", "2", "--photographs", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(trial.main, [str(tiny_dir), variant, *options])
    assert done.exit_code == 0, done.output
    for found in ("KLD, scenes", "KLD, photographs", "KLD, text", "original", variant):
        assert found in done.output
