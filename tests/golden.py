"""Digests of converted files, stored in golden.json, to check code changes that should not change files.

    python tests/golden.py            # enter this machine's digests, on a commit whose files are known to be right

Rounding to the nearest and everything around it (names, shapes, order, metadata, the vision file) is exact arithmetic: one digest holds on
every machine. Calibration sums in floating point, in an order that the CPU's kernels decide, so such digests are kept by what decides
them (:func:`kernels`) and say nothing elsewhere. Torch runs with one thread: with two the tensors are the same bytes, but ratios and
predicted losses differ in their last digits.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from mbq_gguf.calibration.precision import fast_bfloat16
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.rounding.kernels import kernels_for
from rich.console import Console
from tiny_vlm import write_tiny_vlm

FILE = Path(__file__).with_suffix(".json")
PLAIN = {"synthetic": 0, "samples": 3}
EXACT: dict[str, dict[str, Any]] = {
    "nearest": {"method": "rtn", "rounding": "nearest"},
    "nearest, stock type": {"method": "rtn", "rounding": "nearest", "type": "Q4_0"},
    "reference": {"type": "BF16", "mmproj_type": "BF16"},
}
CALIBRATED: dict[str, dict[str, Any]] = {
    "gptq": {"synthetic": 2, "samples": 3},
    "gptq from the original's inputs": {**PLAIN, "propagate_error": False, "refits": 0, "clip": False, "type": "Q3_K"},
    "awq, nearest": {**PLAIN, "method": "awq", "rounding": "nearest"},
    "mbq": {**PLAIN, "method": "mbq"},
    "mbq, rotated": {**PLAIN, "method": "mbq", "rotate": "full"},
    "rotated offline": {**PLAIN, "rotate": "offline", "error_correction": 0.0},
    "target size": {**PLAIN, "method": "awq", "target_bpw": 4.5},
    "token weights": {**PLAIN, "token_weights": "token"},
    "class weights": {**PLAIN, "token_weights": "modality", "prompt_weight": 0.3},
    "learned scales": {**PLAIN, "learn_scales": 1},
}
UNSTABLE_KEYS = ("mbq.tool", "mbq.calibration.fingerprint")  # the version; the set's hash has tests of its own


def kernels() -> str:
    """What decides how floating-point sums come out: torch, its CPU capability and bfloat16 unit, whose CPU it is (MKL asks), and whether a
    compiler is there for rounding's kernels."""
    vendor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("vendor_id")), platform.processor())
    low = (", bf16" if fast_bfloat16() else "") + (", compiled" if kernels_for(torch.empty(0)) else "")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}{low}, {vendor} {platform.machine()}"


def digests(model_dir: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Convert ``model_dir`` and tell of both files the digest of every tensor's name, type, shape and bytes, and the mbq.* metadata."""
    with one_thread():
        report = convert(ConvertOptions(model_dir, out, **options), Console(file=StringIO()))
    return {"text": _digest(report.out), "mmproj": _digest(report.mmproj)}


def write_exact_vlm(directory: Path) -> Path:
    """The tests' tiny VLM with weights that are the same bits on every machine: sums of four whole numbers, about normal."""
    from safetensors.torch import load_file, save_file

    path = write_tiny_vlm(directory) / "model.safetensors"
    weights = load_file(path)
    draw = torch.Generator().manual_seed(1)
    for name in sorted(weights):
        shape = weights[name].shape
        whole = sum(torch.randint(-64, 65, shape, generator=draw) for _ in range(4)).float()  # standard deviation 74.5
        scale, middle = (2.0**-9, 0.0) if len(shape) > 1 else (2.0**-8, 0.0 if name.endswith("bias") else 1.0)
        weights[name] = (whole * scale + middle).bfloat16()
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread while this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def known() -> dict[str, dict[str, Any]]:
    """The digests on file: of :data:`EXACT` under "everywhere", of :data:`CALIBRATED` under :func:`kernels`."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def _digest(path: Path) -> dict[str, Any]:
    header, content = read_header(path), path.read_bytes()
    digest = hashlib.sha256()
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.name):
        start = header.data_start + tensor.offset
        digest.update(f"{tensor.name} {tensor.type_name} {tensor.shape}".encode())
        digest.update(content[start : start + tensor.nbytes])
    described = {key: value for key, value in header.metadata.items() if key.startswith("mbq.") and key not in UNSTABLE_KEYS}
    return {"tensors": digest.hexdigest(), "metadata": described}


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def main() -> None:
    """Enter this machine's digests."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        model = write_exact_vlm(Path(folder) / "model")
        entries = known() if FILE.exists() else {}
        for place, cases in (("everywhere", EXACT), (kernels(), CALIBRATED)):
            entries[place] = {name: digests(model, Path(folder) / "out.gguf", **options) for name, options in cases.items()}
        FILE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
