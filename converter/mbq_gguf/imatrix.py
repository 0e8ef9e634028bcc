"""Computes an importance matrix from a Hugging Face directory: load, calibrate, write."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from mbq_gguf.calibration.dataset import draw_samples
from mbq_gguf.calibration.importance import importance
from mbq_gguf.calibration.stream import capture
from mbq_gguf.errors import UsageError
from mbq_gguf.export.atomic import check_gguf_output
from mbq_gguf.export.imatrix import write_imatrix
from mbq_gguf.export.progress import Stages, progress_bars
from mbq_gguf.export.rehearsal import rehearse, rehearse_quantised
from mbq_gguf.models import load
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.load import check_source, load_meta
from mbq_gguf.models.remote_code import remote_code
from mbq_gguf.preflight import check_device
from mbq_gguf.settings import MMPROJ_TYPE, TURNS


def make_imatrix(
    model_dir: Path,
    out: Path,
    calib: Path | None,
    samples: int,
    seed: int,
    device: str,
    console: Console,
    trust_remote_code: bool = False,
) -> str:
    """Write the importance matrix of the VLM in ``model_dir`` to ``out``; returns a summary sentence.

    ``calib`` as in :func:`draw_samples`. Raises UserError or UsageError for an unusable directory, data set, device or output.
    """
    check_device(device)
    check_gguf_output(out)
    with remote_code(trust_remote_code):
        return _make_imatrix(model_dir, out, calib, samples, seed, device, console)


def _make_imatrix(model_dir: Path, out: Path, calib: Path | None, samples: int, seed: int, device: str, console: Console) -> str:
    check_source(model_dir)
    rehearse(model_dir, weight_files(model_dir), MMPROJ_TYPE)
    say = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    model = load_meta(model_dir)
    if model.decoder.layout.stacks:
        raise UsageError(
            "llama.cpp stores the importance of a layer's experts in one array, which is not supported here: use a model without experts"
        )
    rehearse_quantised(model_dir, {f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in model.decoder.linears()})
    ahead = draw_samples(calib, model.prompts, samples, seed, TURNS, say)
    with progress_bars(console) as bars:
        stages = Stages(bars)
        loaded = load(model_dir, device, prompts=model.prompts)
        drawn = ahead.answered(loaded, say)
        captured = []
        for stream in capture(loaded, drawn):
            captured.append(stream)
            stages("capture", len(captured), len(drawn))
        found = importance(loaded, captured, lambda done, total: stages("layers", done, total))
        names = write_imatrix(model_dir, out, found, "the drawn scenes of mbq-gguf" if calib is None else str(calib))
    return f"importance of {len(names)} tensors on {found.samples} pictures ({found.tokens} tokens) written to {out}"
