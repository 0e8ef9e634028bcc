"""Models that several tests share: a small random Qwen2-VL (real code paths in a second), the reference VLM, and the
built llama.cpp; and a disk that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from mbq_gguf.calibration.dataset import SHIPPED, Sample, read_jsonl
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel, load
from tiny_vlm import write_tiny_vlm


def pytest_configure() -> None:
    """Without a card Triton's kernels are interpreted, which Triton reads where it is imported first: that may be in any test. Hypothesis
    fails an example that takes more than 200 ms unless told otherwise, and a busy machine stops a process for longer."""
    settings.register_profile("no clock", deadline=None)
    settings.load_profile("no clock")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved tiny VLM; read only."""
    return write_tiny_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> LoadedModel:
    """The tiny VLM, loaded; nothing that takes it changes it."""
    return load(tiny_dir)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Four scenes of the shipped calibration set with two turns each."""
    return [Sample(s.image, s.turns[:2]) for s in read_jsonl(SHIPPED)[:4]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The reference VLM as a Hugging Face directory in the user's cache (290 MB, made once); read only."""
    from mbq_gguf.demo.assemble import assemble
    from mbq_gguf.llama_cpp.cache import cache_root

    return assemble(cache_root() / "demo" / "reference-vlm")


@pytest.fixture(scope="session")
def built_llama() -> Path:
    """The tree of the built llama.cpp; the test is skipped where nothing is built."""
    from mbq_gguf.llama_cpp.bindings import bind
    from mbq_gguf.llama_cpp.paths import source_dir

    try:
        bind()
        return source_dir()
    except UserError as error:
        pytest.skip(str(error))
