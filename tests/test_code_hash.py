"""The hash covers the code that determines a file's bytes, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbq_gguf import code_hash as module
from mbq_gguf.code_hash import _collect, _file, code_hash


def sources(name: str) -> list[str]:
    found: dict[Path, bytes] = {}
    _collect(_file(name), found)
    return sorted(str(file.relative_to(module.PACKAGE)) for file in found)


REAL = {name: (module.PACKAGE / name).read_text(encoding="utf-8") for name in sources("convert")}


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def edited(node: ast.AST) -> bool:
    """Whether ``node`` is of a kind that this changes: a value, a name, or an operator."""
    match node:
        case ast.Constant(value=bool() | None as value):
            node.value = not value
        case ast.Constant(value=str() as value):
            node.value = value + "x"
        case ast.Constant(value=int() | float() as value):
            node.value = value + 1
        case ast.Name():
            node.id += "_"
        case ast.Attribute():
            node.attr += "_"
        case ast.arg():
            node.arg += "_"
        case ast.BinOp():
            node.op = ast.Mod() if isinstance(node.op, ast.Mult) else ast.Mult()
        case ast.Compare():
            node.ops[0] = ast.Lt() if isinstance(node.ops[0], ast.LtE) else ast.LtE()
        case _:
            return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / module.PACKAGE.name
    folder.mkdir()
    return folder


def hash_of(text: str, folder: Path, name: str = "first.py") -> str:
    """The hash of the module ``first`` with ``text`` in ``name``."""
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PACKAGE", folder)
        return code_hash.__wrapped__("first")


def test_what_decides_a_layer_is_in_it() -> None:
    found = sources("quantise")
    assert {"quantise.py", "outcome.py", "workdir.py", "allocation/knapsack.py", "rounding/gptq.py", "formats/mbq3s.py"} <= {*found}
    assert {"models/layout.py", "calibration/token_weights/token.py", "transforms/hadamard.py", "errors.py"} <= {*found}
    assert not any(name.startswith(("cli", "evaluate", "llama_cpp", "demo", "export/gguf")) for name in found)
    assert {"convert.py", "export/injection.py", "quantise.py"} <= REAL.keys()


@pytest.mark.parametrize("changed", ["second.py", "second.c"])
def test_another_source_is_another_hash(tmp_path: Path, changed: str) -> None:
    folder = tmp_path / module.PACKAGE.name
    folder.mkdir()
    (folder / "first.py").write_text(f"from {folder.name} import second\n")
    (folder / "second.py").write_text("")
    assert hash_of("a = 1;\n", folder, changed) != hash_of("a = 2;\n", folder, changed)


@given(st.sampled_from(sorted(REAL)), st.booleans())
def test_comments_docstrings_and_layout_do_not_count(folder: Path, name: str, removed: bool) -> None:
    """A module without its comments, in another layout, and with other docstrings, or with none."""
    tree = ast.parse(REAL[name])
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list) and body and is_docstring(body[0]):
            if removed and len(body) > 1:
                del body[0]
            else:
                body[0].value.value = "Another."
    assert hash_of(ast.unparse(tree) + "\n# A comment.\n", folder) == hash_of(REAL[name], folder)


@given(st.data())
def test_any_other_edit_counts(folder: Path, data: st.DataObject) -> None:
    """One value, name or operator changed somewhere in a module."""
    text = REAL[data.draw(st.sampled_from(sorted(REAL)))]
    tree = ast.parse(text)
    silent = {node.value for node in ast.walk(tree) if is_docstring(node)}
    nodes = [node for node in ast.walk(tree) if node not in silent]
    node = data.draw(st.sampled_from(nodes).filter(edited))
    assert hash_of(ast.unparse(tree), folder) != hash_of(text, folder), ast.unparse(node)


def test_no_docstring_is_read() -> None:
    """Docstrings are not hashed, so no code that decides bytes may depend on them."""
    assert not [name for name, text in REAL.items() if re.search(r"__doc__|getdoc|getsource", text)]
