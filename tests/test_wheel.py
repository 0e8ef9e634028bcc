"""A wheel built from the repository and installed elsewhere is complete, and works without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "converter" / "mbq_gguf" / "demo" / "data"


def run(*command: object, **environment: str) -> str:
    """Standard output of a command that must pass; the tree and this environment's settings are hidden from it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], env={**kept, **environment}, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [made] = folder.glob("mbq_gguf-*.whl")
    return made


def test_the_wheel_holds_the_patch_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "ggml_patch", "converter/mbq_gguf", "cbind/mbq_cbind"], capture_output=True, text=True
    )
    tracked = listed.stdout.split()
    if not tracked:
        pytest.skip("not a git tree: what belongs into the wheel is unknown")
    for name in tracked:
        inside = re.sub(r"^(converter|cbind)/", "", name) if not name.startswith("ggml_patch") else f"mbq_gguf/{name}"
        assert held.get(inside) == (ROOT / name).read_bytes(), f"{name} is missing or differs"


def test_an_installed_wheel_finds_the_build_and_reads_files(wheel: Path, built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Only the dependencies are shared with this environment: plain folders on the path, so that its editable install stays out."""
    from mbq_gguf.export.gguf_writer import write_text_gguf

    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    assert run(python, "-c", "import mbq_gguf, mbq_cbind; print(mbq_gguf.__file__, mbq_cbind.__file__)").count(str(site)) == 2
    command = tmp_path / "env" / "bin" / "mbq-gguf"
    assert "convert" in run(command, "--help")
    assert run(command, "path", "llama-server").strip() == str(built_llama / "build" / "bin" / "llama-server")
    file = tmp_path / "tiny.gguf"
    write_text_gguf(tiny_dir, file, quantised={}, replaced={}, base_type="BF16", embedding_type="BF16", metadata={}, file_type=None)
    assert "BF16" in run(command, "inspect", file)


@pytest.mark.slow
def test_an_empty_environment_builds_converts_and_serves(wheel: Path, tmp_path: Path) -> None:
    """About 20 minutes on two cores: everything is fetched and compiled."""
    torch = re.search(r"^TORCH *\?= *(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    venv.create(tmp_path / "env", with_pip=True)
    python, command = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "mbq-gguf"
    run(python, "-m", "pip", "install", "--quiet", torch[1], f"mbq-gguf[build] @ {wheel.as_uri()}")
    cache, model, out = str(tmp_path / "cache"), tmp_path / "model", tmp_path / "small.gguf"
    run(command, "build", "--page", "off", MBQ_GGUF_CACHE=cache)
    run(command, "demo-model", model, MBQ_GGUF_CACHE=cache)
    run(command, "convert", model, out, "--samples", 4, "--synthetic", 0, "--type", "Q8_0", "--rounding", "nearest", MBQ_GGUF_CACHE=cache)
    picture = DATA / "eval" / "images" / "0000.png"  # the first of the shipped questions; eight bits keep its answer
    assert run(command, "ask", out, picture, "How many pink shapes are there?", MBQ_GGUF_CACHE=cache).strip() == "one"
