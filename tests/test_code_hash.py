"""The hash covers the code that determines a file's bytes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from mbq_gguf import code_hash as module
from mbq_gguf.code_hash import _collect, _file, code_hash


def sources(name: str) -> set[str]:
    found: set[Path] = set()
    _collect(_file(name), found)
    return {str(file.relative_to(module.PACKAGE)) for file in found}


def test_what_decides_a_layer_is_in_it() -> None:
    found = sources("quantise")
    assert {"quantise.py", "outcome.py", "workdir.py", "allocation/knapsack.py", "rounding/gptq.py", "formats/mbq3s.py"} <= found
    assert {"models/layout.py", "calibration/token_weights/token.py", "transforms/hadamard.py", "errors.py"} <= found
    assert not any(name.startswith(("cli", "evaluate", "llama_cpp", "demo", "export/gguf")) for name in found)
    assert {"convert.py", "export/injection.py", "quantise.py"} <= sources("convert")


@pytest.mark.parametrize("changed", ["second.py", "second.c"])
def test_another_source_is_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    name = module.PACKAGE.name
    (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "PACKAGE", tmp_path / name)
    (tmp_path / name / "first.py").write_text(f"from {name} import second\n")
    (tmp_path / name / "second.py").write_text("")
    hashes = []
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / name / changed).write_text(text)
        code_hash.cache_clear()
        hashes.append(code_hash("first"))
    code_hash.cache_clear()
    assert hashes[0] != hashes[1]
