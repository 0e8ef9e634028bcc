"""No code of a model directory runs, whatever answer a pipe has ready for transformers' question."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOSTILE: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "Stranger", "auto_map": {"AutoImageProcessor": "stranger.Stranger"}},
    "tokenizer_config.json": {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["stranger.Stranger", "stranger.Stranger"]}},
    "config.json": {"auto_map": {"AutoConfig": "stranger.Stranger", "AutoModelForImageTextToText": "stranger.Stranger"}},
}


@pytest.mark.usefixtures("built_llama")
@pytest.mark.parametrize("type_", ["BF16", "Q4_0"])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_code_of_the_directory_runs(name: str, type_: str, tiny_dir: Path, tmp_path: Path) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_dir, model)
    settings = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps({**settings, **HOSTILE[name]}), encoding="utf-8")
    (model / "stranger.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Stranger: pass\n", encoding="utf-8")
    command = [sys.executable, "-m", "mbq_gguf", "convert", str(model), str(tmp_path / "out.gguf"), "--type", type_]
    done = subprocess.run([*command, "--samples", "1", "--synthetic", "0"], input="y\n" * 9, capture_output=True, text=True, check=False)
    assert not ran.exists()
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2)  # 0 where the file is not needed for what was asked
