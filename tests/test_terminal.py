"""The commands print their messages in any locale and for any file name, never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from mbq_gguf.cli import main
from mbq_gguf.export.metadata import RATIO
from mbq_gguf.terminal import BARS, SIGNS
from nearest_files import write_nearest

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}  # as in en_US.UTF-8
NO_UTF8 = os.fsdecode(b"\xff")


def run(locale: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mbq_gguf", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=os.environ | locale)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")[-800:]
    return done


@pytest.fixture(scope="module")
def file(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file whose table has bars."""
    ratios = {f"{RATIO}mlp": [float(height) for height in range(1, len(BARS) + 1)]}
    return write_nearest(tiny_dir, tmp_path_factory.mktemp("terminal") / "file.gguf", "Q4_0", metadata=ratios)


def test_inspect_draws_with_ascii_where_there_is_nothing_else(file: Path) -> None:
    done = run(ASCII, "inspect", file)
    assert done.returncode == 0
    said = done.stdout.decode("ascii")
    assert "12345678" in said
    assert "49152 x 128" in said
    assert "".join(SIGNS[bar] for bar in BARS) == "12345678"
    assert BARS in run(UTF8, "inspect", file).stdout.decode()


@pytest.mark.parametrize("arguments", [("--help",), ("models",), *((name, "--help") for name in sorted(main.commands))], ids=" ".join)
def test_help_and_tables_in_ascii(arguments: tuple[str, ...]) -> None:
    assert isinstance(main, click.Group)
    done = run(ASCII, *arguments)
    assert done.returncode == 0
    assert done.stdout.decode("ascii")


@pytest.mark.parametrize("locale", [ASCII, UTF8], ids=["ascii", "utf-8"])
def test_a_conversion_into_a_file_whose_name_is_no_utf_8(locale: dict[str, str], built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out-\xe9{NO_UTF8}.gguf"
    arguments = ("--rounding", "nearest", "--type", "Q4_0", "--card")
    assert run(locale, "convert", tiny_dir, out, *arguments).returncode == 0
    assert out.is_file()
    assert b"\\udcff.gguf" in (tmp_path / "README.md").read_bytes()
    assert run(locale, "card", out).returncode == 0


@pytest.mark.parametrize("locale", [ASCII, UTF8], ids=["ascii", "utf-8"])
def test_a_model_whose_path_is_no_text(locale: dict[str, str], built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_dir, tmp_path / f"model{NO_UTF8}"))
    done = run(locale, "convert", model, tmp_path / "out.gguf")
    assert done.returncode == 2
    assert b"is not valid UTF-8: rename it, or set PYTHONUTF8=1" in done.stderr


def test_path_gives_a_shell_the_very_bytes(built_llama: Path, tmp_path: Path) -> None:
    programs = tmp_path / f"llama-\xe9{NO_UTF8}" / "build" / "bin"
    programs.mkdir(parents=True)
    (programs / "llama-server").symlink_to("/bin/true")
    done = run(ASCII | {"MBQ_GGUF_LLAMA_CPP": str(programs.parents[1])}, "path", "llama-server")
    assert done.stdout.rstrip(b"\n") == os.fsencode(programs / "llama-server")
