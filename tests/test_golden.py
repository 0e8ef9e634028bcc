"""Converted files have the same tensors as when golden.json was made (see golden.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import CALIBRATED, EXACT, digests, kernels, known, write_exact_vlm


@pytest.fixture(scope="module")
def exact_dir(built_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exact_vlm(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("name", EXACT)
def test_uncalibrated_files_are_the_same_everywhere(name: str, exact_dir: Path, tmp_path: Path) -> None:
    assert digests(exact_dir, tmp_path / "out.gguf", **EXACT[name]) == known()["everywhere"][name]


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_files_are_the_same_with_the_same_kernels(name: str, exact_dir: Path, tmp_path: Path) -> None:
    if name not in known().get(kernels(), {}):
        pytest.skip(f"no digest for {kernels()}: run `python tests/golden.py` on a commit whose files are right")
    assert digests(exact_dir, tmp_path / "out.gguf", **CALIBRATED[name]) == known()[kernels()][name]
