"""The replacement for the pinned package's build backend, as pip releases read it."""

from __future__ import annotations

from email import message_from_string
from pathlib import Path
from typing import Any

from mbq_gguf.llama_cpp.source import _BACKEND, pip_failure


def test_name_and_version_stand_in_the_folders_name_too(tmp_path: Path) -> None:
    """pip 23.2, which a new environment of Python 3.11 has, reads them there; newer ones in the file."""
    backend: dict[str, Any] = {}
    exec(_BACKEND.format(name="a-package", version="1.2.0"), backend)
    folder = backend["prepare_metadata_for_build_wheel"](str(tmp_path))
    assert folder == "a_package-1.2.0.dist-info"
    metadata = message_from_string((tmp_path / folder / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("a-package", "1.2.0")


def test_a_full_disk_is_told_from_the_network() -> None:
    """The end of what pip 24.0 writes if its wheel does not fit."""
    full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device: '/tmp/a' -> '/disk/a'\n"
    assert ": free some space in " in str(pip_failure("a==1", full, "check the network"))
    assert str(pip_failure("a==1", "ERROR: no a\n", "check the network")) == "pip could not download a==1 (no a): check the network"
