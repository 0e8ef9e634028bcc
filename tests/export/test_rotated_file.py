"""A rotated model as files: libllama with the online transform gives the same results as with the plain model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from mbq_gguf.formats.gguf_types import import_gguf
from rich.console import Console

# Q8_0 rounds weights by 1/256 of each block's largest; another basis makes other errors of the same size.
TIMES = 3.0


def write(model: Path, folder: Path, name: str, **options: Any) -> ConvertOptions:
    chosen = ConvertOptions(model, folder / f"{name}.gguf", method="rtn", rounding="nearest", mmproj_type="F32", **options)
    convert(chosen, Console(quiet=True))
    return chosen


def logits(files: ConvertOptions) -> Floats:
    with Model(files.out, files.mmproj, context=512) as model:
        picture = model.vision.encode(load_questions(SHIPPED)[0].image)
        return model.logits(model.prompt("What is the value of the blue bar?"), [picture], model.tokenize("three or four"))


@pytest.fixture(scope="module")
def expected(built_llama: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Floats:
    """Logits of the model as it is."""
    return logits(write(tiny_dir, tmp_path_factory.mktemp("plain"), "plain", type="BF16"))


def test_rotated_files_give_the_plain_logits(expected: Floats, tiny_dir: Path, tmp_path: Path) -> None:
    rounded = write(tiny_dir, tmp_path, "rounded", type="Q8_0")
    bound = TIMES * float(np.abs(logits(rounded) - expected).max())
    assert bound < 0.5 * float(np.abs(expected).max())  # or nothing below would mean anything
    for rotate in ("offline", "full"):
        turned = write(tiny_dir, tmp_path, rotate, type="Q8_0", rotate=rotate)
        assert float(np.abs(logits(turned) - expected).max()) < bound
        fields = import_gguf().GGUFReader(turned.out).fields
        assert fields["mbq.rotate"].contents() == rotate
        assert ("mbq.hadamard.ffn_down" in fields) == (rotate == "full")


def test_w4a8_is_rotated_unless_told_and_says_who_runs_it(expected: Floats, tiny_dir: Path, tmp_path: Path) -> None:
    off = []
    for name, chosen in (("none", {"rotate": "none"}), ("default", {})):
        files = ConvertOptions(tiny_dir, tmp_path / f"{name}.gguf", type="W4A8", samples=2, synthetic=0, mmproj_type="F32", **chosen)
        report = convert(files, Console(quiet=True))
        off.append(float(np.abs(logits(files) - expected).max()))
        assert any("--rotate offline works everywhere" in sentence for sentence in report.fallbacks) == (name == "default")
    fields = import_gguf().GGUFReader(tmp_path / "default.gguf").fields
    assert fields["mbq.rotate"].contents() == "full"
    assert "mbq.hadamard.ffn_down" in fields
    assert "mbq.rotate" not in import_gguf().GGUFReader(tmp_path / "none.gguf").fields
    assert off[1] < TIMES * off[0] < TIMES * 0.5 * float(np.abs(expected).max())


LOAD = """
import sys
from pathlib import Path
from mbq_cbind.errors import BindingError
from mbq_cbind.model import Model
from mbq_gguf.llama_cpp.bindings import bind
bind()
for path in sys.argv[1:]:
    try:
        Model(Path(path), context=64)
    except BindingError as error:
        print(Path(path).stem, error)
"""


@pytest.mark.usefixtures("built_llama")
def test_no_block_size_aborts_the_process(tiny_dir: Path, tmp_path: Path) -> None:
    """One process loads all of them: an abort at any would end it early, by a signal."""
    written = write(tiny_dir, tmp_path, "turned", type="Q8_0", rotate="full").out
    whole = written.read_bytes()
    key = b"mbq.hadamard.ffn_down"
    place = whole.index(key) + len(key) + 4  # behind the key lie the value's type and then its four bytes
    block = int.from_bytes(whole[place : place + 4], "little")
    reader = import_gguf().GGUFReader(written)
    width = next(int(tensor.shape[0]) for tensor in reader.tensors if "ffn_down" in tensor.name)
    assert width % block == 0
    sizes = (0, 1, 3, 2**31, 2**15, 512 if width % 512 else 1024, 0xFFFFFFFF)
    files = [tmp_path / f"{wrong}.gguf" for wrong in sizes]
    for wrong, file in zip(sizes, files, strict=True):
        file.write_bytes(whole[:place] + wrong.to_bytes(4, "little") + whole[place + 4 :])
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.returncode} after\n{done.stdout}\n{done.stderr}"
    refused = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in refused] == [file.stem for file in files]
    assert all("mbq.hadamard.ffn_down is" in error for _, error in refused)
