"""The gguf package with the MBQ types registered, from a built tree or as installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_modules import loaded_gguf, restore_gguf
from mbq_gguf.errors import UserError
from mbq_gguf.formats.gguf_types import FILE_TYPES, import_from_tree, import_gguf
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.quant_type import QuantType


@pytest.fixture(params=["tree", "installed"])
def gguf(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Either copy of the package; what other tests have loaded is put back afterwards."""
    saved, path = loaded_gguf(), list(sys.path)
    if request.param == "tree":
        request.getfixturevalue("built_llama")
    else:
        monkeypatch.delenv("MBQ_GGUF_LLAMA_CPP", raising=False)
        monkeypatch.setenv("MBQ_GGUF_CACHE", str(tmp_path))  # an empty cache: nothing is built
        sys.path[:] = [entry for entry in path if "gguf-py" not in entry]
        restore_gguf({})
    yield import_gguf()
    restore_gguf(saved)
    sys.path[:] = path


@pytest.mark.parametrize("quant_type", list(OWN.values()), ids=lambda quant_type: quant_type.name)
def test_type_is_known(gguf: object, quant_type: QuantType) -> None:
    kind = gguf.GGMLQuantizationType(quant_type.type_id)
    assert (kind.name, int(kind)) == (quant_type.name, quant_type.type_id)
    assert gguf.GGMLQuantizationType[quant_type.name] is kind
    assert getattr(gguf.GGMLQuantizationType, quant_type.name) is kind
    assert kind in list(gguf.GGMLQuantizationType)
    assert gguf.GGML_QUANT_SIZES[kind] == (quant_type.block_size, quant_type.type_size)


@pytest.mark.parametrize("quant_type", list(OWN.values()), ids=lambda quant_type: quant_type.name)
def test_quantiser_is_the_quant_type(gguf: object, quant_type: QuantType) -> None:
    weights = np.random.default_rng(0).standard_normal((37, 4 * quant_type.block_size)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[quant_type.name]
    data = gguf.quants.quantize(weights, kind)
    assert np.array_equal(data, quant_type.quantize(weights))
    assert np.array_equal(gguf.quants.dequantize(data, kind), quant_type.dequantize(data))


def test_file_types_are_known(gguf: object) -> None:
    assert {name: int(gguf.LlamaFileType[name]) for name in FILE_TYPES} == {
        "MOSTLY_MBQ3": 120,
        "MOSTLY_MBQ3_64": 121,
        "MOSTLY_MBQ3S": 122,
        "MOSTLY_MBQ3S_64": 123,
    }


def test_second_import_changes_nothing(gguf: object) -> None:
    members = list(gguf.GGMLQuantizationType)
    assert import_gguf() is gguf
    assert list(gguf.GGMLQuantizationType) == members


def test_tree_goes_before_what_is_loaded(built_llama: Path) -> None:
    module = import_from_tree("gguf", built_llama / "gguf-py")
    assert Path(module.__file__).resolve().is_relative_to((built_llama / "gguf-py").resolve())


def test_missing_package_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no package conversion"):
        import_from_tree("conversion", tmp_path)
