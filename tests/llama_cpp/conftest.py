"""Fixtures: a tiny workshop of the test's own, and the real build."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from mbq_gguf.llama_cpp import pin, verify
from rich.console import Console
from tiny_pair import Pair, write_pair
from workshop_tree import FILES, Workshop


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop(tmp_path, Console(file=io.StringIO(), width=300))
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shop.write_pin("0" * 64)
    monkeypatch.setattr(pin, "patch_dir", lambda: shop.patch)
    monkeypatch.setattr(verify, "CHECK_PROGRAM", tmp_path / "proof.py")
    monkeypatch.setenv("MBQ_GGUF_CACHE", str(shop.cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    for name in ("MBQ_GGUF_LLAMA_CPP", "MBQ_GGUF_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return shop


@pytest.fixture(scope="session")
def built(built_llama: Path) -> Path:
    """The folder with the real build's programs and libraries."""
    return built_llama / "build" / "bin"


@pytest.fixture(scope="session")
def tiny_pair(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tiny_dir, tmp_path_factory.mktemp("tiny-gguf"))
