"""Code of a model directory runs only with --trust-remote-code, whatever a pipe answers to transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mbq_gguf.cli import main
from mbq_gguf.errors import UserError
from mbq_gguf.models.load import check_source
from safetensors.torch import load_file, save_file

HOSTILE: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "Stranger", "auto_map": {"AutoImageProcessor": "stranger.Stranger"}},
    "tokenizer_config.json": {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["stranger.Stranger", "stranger.Stranger"]}},
    "config.json": {"auto_map": {"AutoConfig": "stranger.Stranger", "AutoModelForImageTextToText": "stranger.Stranger"}},
}


def run(*arguments: object, process: bool, **environment: str) -> tuple[int, str]:
    """Exit code of ``mbq-gguf ARGUMENTS`` and all that it said; nine lines of yes lie in its input. In a process of its own where code
    of a directory is to run, or where a pipe must be one."""
    words, said_yes = [str(argument) for argument in arguments], "y\n" * 9
    if process:
        command = [sys.executable, "-m", "mbq_gguf", *words]
        done = subprocess.run(command, input=said_yes, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        return done.returncode, done.stdout + done.stderr
    result = CliRunner().invoke(main, words, input=said_yes)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception  # else a traceback
    return result.exit_code, result.output


@pytest.mark.usefixtures("built_llama")
@pytest.mark.parametrize("type_", ["BF16", "Q4_0"])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_code_of_the_directory_runs(name: str, type_: str, tiny_dir: Path, tmp_path: Path) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_dir, model)
    settings = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps({**settings, **HOSTILE[name]}), encoding="utf-8")
    (model / "stranger.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Stranger: pass\n", encoding="utf-8")
    line = ("convert", model, tmp_path / "out.gguf", "--type", type_, "--samples", 1, "--synthetic", 0)
    code, said = run(*line, process=(name, type_) == ("config.json", "Q4_0"))
    assert not ran.exists()
    assert "Traceback" not in said
    assert code in (0, 1, 2)  # 0 if the file is not needed for what was asked


STRANGER = """
import pathlib
from transformers import Qwen2VLForConditionalGeneration
pathlib.Path({ran!r}).touch()
class Qwen2VLStranger(Qwen2VLForConditionalGeneration):
    pass
"""


@pytest.mark.usefixtures("built_llama")
@pytest.mark.parametrize("command", ["convert", pytest.param("imatrix", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_class_of_the_directory_runs_where_it_is_trusted(trusted: bool, command: str, tiny_dir: Path, tmp_path: Path) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForImageTextToText": "stranger.Qwen2VLStranger"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # transformers renames old keys for its own classes alone: a class of the directory has its own.
    tensors = load_file(model / "model.safetensors")
    newer = {
        re.sub(r"^model\.(?!visual)", "model.language_model.", re.sub(r"^visual", "model.visual", name)): t for name, t in tensors.items()
    }
    save_file(newer, model / "model.safetensors", metadata={"format": "pt"})
    (model / "stranger.py").write_text(STRANGER.format(ran=str(ran)), encoding="utf-8")
    line = [command, model, tmp_path / "out.gguf", "--samples", 1]
    line += ["--synthetic", 0, "--type", "Q4_0"] if command == "convert" else []
    code, said = run(*line, *["--trust-remote-code"] * trusted, process=trusted, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert code == 0, said
    assert ran.exists() == trusted


@pytest.mark.usefixtures("built_llama")
def test_a_model_that_needs_code_names_the_option(tiny_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "stranger", "architectures": ["Stranger"], "auto_map": {"AutoConfig": "stranger.Stranger"}}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="Stranger needs Python code from its directory: give --trust-remote-code"):
        check_source(model)
